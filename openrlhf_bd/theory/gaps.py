"""Measured gaps beside their bounds: what `openrlhf-bd theory` prints and draws."""

# S states, A actions

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openrlhf_bd.theory.bounds import kappa, lower_bound, projection_cost
from openrlhf_bd.theory.mdp import Array, Mask, TabularMDP, always_ends, top_p_mdp
from openrlhf_bd.theory.sets import project, set_mass, supported_norm, top_p_sets
from openrlhf_bd.theory.solve import FixedPoint, evaluate_policy, solve_optimal


@dataclass(frozen=True)
class Gaps:
    """What restriction to top-p sets costs in one MDP, in nats; gaps of Q are largest over states and sets.

    Attributes:
        ends: whether every policy ends: then gaps stay far below the bound as gamma grows.
        kappa_p: kappa(p), the bound of Propositions 2 and 4.
        kappa_mass: kappa(min_s P(s)), the finer bound.
        projected_gap: |Q* - Q^{proj pi*}| (Prop. 2).
        optimal_gap: |Q* - Q_p*| (Prop. 4).
        lower_bound: largest gamma E[-log P(s')].
        value_gap: largest V* - V^{proj pi*}; at most kappa / gamma, not kappa.
        exclusive_gap: |Q* - Q^{proj pi*}| where the sets leave out the action that crosses p.
        violations: claims that do not hold beyond `error`, of Propositions 2-4, both bounds and the exact identity.
        residual: largest residual of the fixed points.
        error: how far that leaves a gap from its exact value: residuals over 1 - gamma, and rounding.
    """

    ends: bool
    kappa_p: float
    kappa_mass: float
    projected_gap: float
    optimal_gap: float
    lower_bound: float
    value_gap: float
    exclusive_gap: float
    violations: int
    residual: float
    error: float


def measure_gaps(mdp: TabularMDP, optimum: FixedPoint, top_p: float) -> Gaps:
    """Solve M_p, evaluate the projected teacher, and check every claim about them.

    Args:
        mdp: M, with gamma < 1.
        optimum: Q* and pi* of it.
        top_p: p in (0, 1].
    """
    sets_SA = top_p_sets(optimum.policy_SA, top_p)
    projected = evaluate_policy(top_p_mdp(mdp, sets_SA), project(optimum.policy_SA, sets_SA))
    restricted = solve_optimal(top_p_mdp(mdp, sets_SA))
    residuals = (optimum.residual, projected.residual, restricted.residual)
    error = sum(residuals) / (1 - mdp.gamma) + 1e-12 * float(np.abs(optimum.q_SA).max())

    kappa_p = kappa(top_p, mdp.gamma)
    kappa_mass = kappa(float(set_mass(optimum.policy_SA, sets_SA).min()), mdp.gamma)
    projected_SA = _difference(optimum, projected, sets_SA)
    optimal_SA = _difference(optimum, restricted, sets_SA)
    lower_SA = np.where(sets_SA, lower_bound(mdp, optimum.policy_SA, sets_SA), 0.0)
    value_gap_S = optimum.value_S - projected.value_S
    claims = {
        "Prop. 2": projected_SA <= kappa_p + error,
        "Prop. 4": optimal_SA <= kappa_p + error,
        "Prop. 2 with the mass that is there": projected_SA <= kappa_mass + error,
        "Prop. 3, left": optimal_SA <= projected_SA + error,
        "Prop. 3, right": optimal_SA >= -error,
        "lower bound": optimal_SA >= lower_SA - error,
        "identity": np.abs(value_gap_S - projection_cost(mdp, optimum.policy_SA, sets_SA)) <= error,
    }
    return Gaps(
        ends=always_ends(mdp),
        kappa_p=kappa_p,
        kappa_mass=kappa_mass,
        projected_gap=float(projected_SA.max()),
        optimal_gap=float(optimal_SA.max()),
        lower_bound=float(lower_SA.max()),
        value_gap=float(value_gap_S.max()),
        exclusive_gap=exclusive_gap(mdp, optimum, top_p),
        violations=sum(not holds.all() for holds in claims.values()),
        residual=max(residuals),
        error=error,
    )


def exclusive_gap(mdp: TabularMDP, optimum: FixedPoint, top_p: float) -> float:
    """|Q* - Q^{proj pi*}|, nats, where the sets leave out the action that crosses p."""
    sets_SA = top_p_sets(optimum.policy_SA, top_p, inclusive=False)
    projected = evaluate_policy(top_p_mdp(mdp, sets_SA), project(optimum.policy_SA, sets_SA))
    return supported_norm(_difference(optimum, projected, sets_SA), sets_SA)


def _difference(first: FixedPoint, second: FixedPoint, sets_SA: Mask) -> Array:
    """Q - Q' on the sets, 0 outside."""
    return np.where(sets_SA, first.q_SA - np.where(sets_SA, second.q_SA, 0.0), 0.0)
