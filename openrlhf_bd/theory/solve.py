"""Fixed points of the soft Bellman operators, each with the residual that it was found to.

A residual is |B Q - Q| in the supported infinity-norm; where B contracts with modulus gamma, Q is within
residual / (1 - gamma) of the fixed point.
"""

# S states, A actions

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from openrlhf_bd.theory.mdp import Array, TabularMDP, discounted_sum, next_mean
from openrlhf_bd.theory.operators import optimal_soft_backup, policy_value, soft_backup, soft_policy, soft_value
from openrlhf_bd.theory.sets import mask, supported_norm

TOLERANCE = 1e-11


@dataclass(frozen=True)
class FixedPoint:
    """A solution of Q = B Q.

    Attributes:
        q_SA: Q, nats; -inf where an action is not available.
        value_S: soft value of the policy, nats.
        policy_SA: the policy that Q belongs to.
        residual: |B Q - Q|, nats.
        num_iterations: how often the operator, or a policy's evaluation, was applied.
    """

    q_SA: Array
    value_S: Array
    policy_SA: Array
    residual: float
    num_iterations: int


def iterate(
    operator: Callable[[Array], Array], q_SA: Array, *, tolerance: float = TOLERANCE, max_iterations: int = 100_000
) -> tuple[Array, float, int]:
    """Banach's iteration Q <- B Q until |B Q - Q| <= tolerance.

    Args:
        operator: B.
        q_SA: where to start, nats; -inf where an action is not available.
        tolerance: residual to reach, nats.
        max_iterations: applications of B.

    Returns:
        (Q, its residual, applications of B).

    Raises:
        ArithmeticError: the residual was not reached.
    """
    residual = np.inf
    for iteration in range(1, max_iterations + 1):
        next_SA = operator(q_SA)
        residual = _residual(next_SA, q_SA)
        if residual <= tolerance:
            return q_SA, residual, iteration
        q_SA = next_SA
    raise ArithmeticError(
        f"residual {residual:g} after {max_iterations} iterations, expected {tolerance:g}; allow more iterations"
    )


def evaluate_policy(mdp: TabularMDP, policy_SA: Array) -> FixedPoint:
    """Fixed point of B^pi (Eq. 6; Eq. 9 in M_p), by one linear system.

    V = r_pi + H_pi + gamma P_pi V,   Q = r + gamma P V

    Args:
        mdp: M or M_p.
        policy_SA: pi, with mass on available actions alone.
    """
    gain_S = policy_value(mdp.reward_SA, policy_SA)  # r_pi + H_pi
    value_S = discounted_sum(mdp, policy_SA, gain_S)
    q_SA = mask(mdp.reward_SA + mdp.gamma * next_mean(mdp, value_S), mdp.available_SA)
    return FixedPoint(q_SA, value_S, policy_SA, _residual(soft_backup(mdp, q_SA, policy_SA), q_SA), 1)


def solve_optimal(mdp: TabularMDP, *, tolerance: float = TOLERANCE, max_iterations: int = 200) -> FixedPoint:
    """Q* and pi* = pi_{Q*} (of M_p: Q_p* and pi_p*), by soft policy iteration.

    pi_{k+1} = exp(Q^{pi_k} - V^{Q^{pi_k}}),   values never fall, and the last steps square the error

    Args:
        mdp: M or M_p.
        tolerance: residual of the optimality operator to reach, nats.
        max_iterations: policies to evaluate.

    Raises:
        ArithmeticError: the residual was not reached.
    """
    policy_SA = mdp.available_SA / mdp.available_SA.sum(axis=1, keepdims=True)
    residual = np.inf
    for iteration in range(1, max_iterations + 1):
        q_SA = evaluate_policy(mdp, policy_SA).q_SA
        residual = _residual(optimal_soft_backup(mdp, q_SA), q_SA)
        policy_SA = soft_policy(q_SA)
        if residual <= tolerance:
            return FixedPoint(q_SA, soft_value(q_SA), policy_SA, residual, iteration)
    raise ArithmeticError(
        f"residual {residual:g} after {max_iterations} policies, expected {tolerance:g}; rewards of "
        f"{np.abs(mdp.reward_SA).max():g} nats at gamma {mdp.gamma} may leave too few digits"
    )


def _residual(next_SA: Array, q_SA: Array) -> float:
    return supported_norm(next_SA - np.where(np.isfinite(q_SA), q_SA, 0.0), np.isfinite(q_SA))
