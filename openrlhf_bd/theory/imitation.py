"""Inverse soft Q-learning in tables: the objective with chi-squared (Eq. 14, 17), its gradient and its optimum.

phi(x) = x - x^2 / (4 alpha). The weights w(s, a) are the data: the teacher's occupancy rho*, of a top-p MDP its part on
the sets (`out_of_set drop`), or the visits of whole responses, each token counting alike, as the loss over tokens has.
"""

# S states, A actions, M available actions of all states

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openrlhf_bd.theory.mdp import Array, TabularMDP
from openrlhf_bd.theory.occupancy import source
from openrlhf_bd.theory.operators import inverse_soft_backup, soft_policy, soft_value


@dataclass(frozen=True)
class ImitationOptimum:
    """A stationary point of the objective.

    Attributes:
        q_SA: Q, nats; -inf where an action is not available.
        policy_SA: pi_Q.
        gradient_norm: largest entry of the gradient there.
        num_iterations: Newton steps.
    """

    q_SA: Array
    policy_SA: Array
    gradient_norm: float
    num_iterations: int


def imitation_objective(
    mdp: TabularMDP, q_SA: Array, weight_SA: Array, *, alpha: float, chi_SA: Array | None = None
) -> float:
    """The objective of Eq. 17, which learning maximises.

    J(Q) = sum_{s, a} w(s, a) { phi(r(s, a)) - [V(s) - gamma E V(s')] },   r = Q - gamma E V(s')

    With weights m of their own for chi-squared, as in the mixture of LS-IQ, w phi(r) becomes w r - m r^2 / (4 alpha).

    Args:
        mdp: M, or M_p for the masked and projected objective; its rewards are not read.
        q_SA: Q, nats; -inf where an action is not available.
        weight_SA: w, >= 0, 0 where an action is not available.
        alpha: coefficient of chi-squared; inf leaves the linear part.
        chi_SA: m, likewise; None: w.
    """
    reward_SA = inverse_soft_backup(mdp, q_SA)
    penalty_SA = (weight_SA if chi_SA is None else chi_SA) * reward_SA**2 / (4.0 * alpha)
    return float((weight_SA * reward_SA - penalty_SA).sum() - source(mdp, weight_SA) @ soft_value(q_SA))


def imitation_objective_at_starts(mdp: TabularMDP, q_SA: Array, weight_SA: Array, *, alpha: float) -> float:
    """The objective of Eq. 14: as Eq. 17, with (1 - gamma) E[V(s_0)] in place of its telescoped form.

    J(Q) = sum_{s, a} w(s, a) phi(r(s, a)) - (1 - gamma) E_{s_0}[V(s_0)]

    The same number where w is a normalised occupancy measure from the MDP's starts. Arguments as there.
    """
    reward_SA = inverse_soft_backup(mdp, q_SA)
    phi_SA = reward_SA - reward_SA**2 / (4.0 * alpha)
    return float((weight_SA * phi_SA).sum() - (1.0 - mdp.gamma) * mdp.start_S @ soft_value(q_SA))


def occupancy_from_reward(
    mdp: TabularMDP, q_SA: Array, weight_SA: Array, *, alpha: float, chi_SA: Array | None = None
) -> Array:
    """w - chi r / (2 alpha), w phi'(r) where chi is w: the learner's occupancy, at a stationary point."""
    chi_SA = weight_SA if chi_SA is None else chi_SA
    found_SA: Array = weight_SA - chi_SA * inverse_soft_backup(mdp, q_SA) / (2.0 * alpha)
    return found_SA


def imitation_gradient(
    mdp: TabularMDP, q_SA: Array, weight_SA: Array, *, alpha: float, chi_SA: Array | None = None
) -> Array:
    """Gradient of imitation_objective with respect to Q.

    m(s, a) - pi_Q(a | s) [ source_w(s) + gamma sum_{s', a'} m(s', a') P(s | s', a') ],   m of occupancy_from_reward

    It is 0 exactly where m is the occupancy of pi_Q from the starts of w: at p = 1 rho* (1 - r/(2 alpha)) = rho^pi.

    Returns:
        [S, A]; 0 where an action is not available.
    """
    m_SA = occupancy_from_reward(mdp, q_SA, weight_SA, alpha=alpha, chi_SA=chi_SA)
    return m_SA - soft_policy(q_SA) * _inflow(mdp, weight_SA, m_SA)[:, None]


def chi_squared_dual(mdp: TabularMDP, policy_rho_SA: Array, expert_rho_SA: Array, *, alpha: float) -> float:
    """The best reward's value in Eq. 3, which imitation minimises over policies; at the optimum it is J.

    max_r E_{rho*}[phi(r)] - E_{rho^pi}[r] - H(pi) = alpha sum (rho* - rho^pi)^2 / rho* - E_{rho^pi}[-log pi]

    The entropy is that of the learner's own visits (Eq. 3 prints those of the teacher).

    Args:
        mdp: M.
        policy_rho_SA: rho^pi, positive.
        expert_rho_SA: rho*, positive.
        alpha: coefficient of chi-squared.
    """
    policy_SA = policy_rho_SA / policy_rho_SA.sum(axis=1, keepdims=True)
    distance = float(((expert_rho_SA - policy_rho_SA) ** 2 / expert_rho_SA).sum())
    return alpha * distance + float((policy_rho_SA * np.log(policy_SA)).sum())


def imitation_optimum(
    mdp: TabularMDP,
    weight_SA: Array,
    *,
    alpha: float,
    chi_SA: Array | None = None,
    tolerance: float = 1e-12,
    max_iterations: int = 200,
) -> ImitationOptimum:
    """Maximise imitation_objective by Newton's method with backtracking.

    The start is the weights' own policy with V = 0. Curvature that would make a step climb backwards is left out; it
    vanishes at an optimum with a non-negative occupancy.

    Args:
        mdp: M or M_p.
        weight_SA: w, positive exactly where an action is available.
        alpha: coefficient of chi-squared, finite.
        chi_SA: weights of chi-squared, positive there too; None: w.
        tolerance: gradient to reach.
        max_iterations: Newton steps.

    Raises:
        ArithmeticError: the gradient was not reached.
    """
    on_SA = mdp.available_SA
    q_SA = np.full(on_SA.shape, -np.inf)
    q_SA[on_SA] = np.log((weight_SA / weight_SA.sum(axis=1, keepdims=True))[on_SA])
    chi_SA = weight_SA if chi_SA is None else chi_SA
    norm = np.inf
    for iteration in range(max_iterations):
        gradient_M = imitation_gradient(mdp, q_SA, weight_SA, alpha=alpha, chi_SA=chi_SA)[on_SA]
        norm = float(np.abs(gradient_M).max())
        if norm <= tolerance:
            return ImitationOptimum(q_SA, soft_policy(q_SA), norm, iteration)
        curvature_MM = _negative_curvature(mdp, q_SA, weight_SA, chi_SA, alpha)
        step_M = np.asarray(np.linalg.solve(curvature_MM, gradient_M), dtype=np.float64)
        q_SA = _climb(mdp, q_SA, weight_SA, chi_SA, alpha, step_M, float(gradient_M @ step_M))
    raise ArithmeticError(f"gradient {norm:g} after {max_iterations} steps, expected {tolerance:g}")


def _inflow(mdp: TabularMDP, weight_SA: Array, m_SA: Array) -> Array:
    return source(mdp, weight_SA) + mdp.gamma * np.einsum("sa,sat->t", m_SA, mdp.transition_SAS)


def _negative_curvature(mdp: TabularMDP, q_SA: Array, weight_SA: Array, chi_SA: Array, alpha: float) -> Array:
    """-(second derivative of J) over the available actions: D' diag(chi / (2 alpha)) D + sum_s c(s) Cov_{pi(s)}."""
    state_M, action_M = np.nonzero(mdp.available_SA)
    policy_M = soft_policy(q_SA)[state_M, action_M]
    m_SA = occupancy_from_reward(mdp, q_SA, weight_SA, alpha=alpha, chi_SA=chi_SA)
    inflow_S = _inflow(mdp, weight_SA, m_SA).clip(min=0.0)
    # D = d r / d Q: Q itself, and what it adds to the value of the state that it belongs to.
    slope_MM = np.eye(len(state_M)) - mdp.gamma * mdp.transition_SAS[state_M, action_M][:, state_M] * policy_M
    same_MM = state_M[:, None] == state_M
    covariance_MM = np.diag(policy_M) - np.where(same_MM, np.outer(policy_M, policy_M), 0.0)
    scale_M = chi_SA[state_M, action_M] / (2.0 * alpha)
    return slope_MM.T @ (scale_M[:, None] * slope_MM) + inflow_S[state_M][:, None] * covariance_MM


def _climb(
    mdp: TabularMDP, q_SA: Array, weight_SA: Array, chi_SA: Array, alpha: float, step_M: Array, slope: float
) -> Array:
    """Q after the longest step of 1, 1/2, 1/4, ... that climbs; the shortest where rounding hides the climb."""
    before = imitation_objective(mdp, q_SA, weight_SA, alpha=alpha, chi_SA=chi_SA)
    on_SA = mdp.available_SA
    size = 1.0
    next_SA = q_SA.copy()
    while size > 1e-6:
        next_SA[on_SA] = q_SA[on_SA] + size * step_M
        rise = imitation_objective(mdp, next_SA, weight_SA, alpha=alpha, chi_SA=chi_SA) - before
        if rise >= 0.1 * size * slope - 1e-14 * abs(before):
            break
        size /= 2
    return next_SA
