"""Occupancy measures, and the starts that a measure comes from."""

# S states, A actions

from __future__ import annotations

import numpy as np

from openrlhf_bd.theory.mdp import Array, TabularMDP, policy_transition


def occupancy(mdp: TabularMDP, policy_SA: Array, start_S: Array) -> Array:
    """Discounted visits of a policy (section "Occupancy measures").

    rho(s, a) = E_pi[ sum_t gamma^t 1{s_t = s, a_t = a} | s_0 ~ start ]

    Args:
        mdp: M or M_p; gamma 1 counts visits.
        policy_SA: pi.
        start_S: measure of s_0. With (1 - gamma) mu the sum of rho is 1 in an MDP that never ends: Eq. 4-17 mean
            this one. Linear, so a signed measure is allowed too.

    Returns:
        [S, A].
    """
    system_SS = np.eye(mdp.num_states) - mdp.gamma * policy_transition(mdp, policy_SA).T
    visits_S = np.asarray(np.linalg.solve(system_SS, start_S), dtype=np.float64)
    return visits_S[:, None] * policy_SA


def expert_occupancy(mdp: TabularMDP, policy_SA: Array) -> Array:
    """rho of Eq. 4-17: discounted visits from the MDP's own starts, times 1 - gamma (of visits, where gamma is 1)."""
    scale = 1.0 if mdp.gamma == 1 else 1.0 - mdp.gamma
    return occupancy(mdp, policy_SA, scale * mdp.start_S)


def source(mdp: TabularMDP, weight_SA: Array) -> Array:
    """Starts that make a weight of (s, a) an occupancy measure: occupancy(mdp, its policy, source) is the weight.

    source(s) = sum_a w(s, a) - gamma sum_{s', a'} w(s', a') P(s | s', a')        (Bellman's flow equation)

    Args:
        mdp: M or M_p.
        weight_SA: any weight.

    Returns:
        [S]; (1 - gamma) mu for a policy's own normalised occupancy, and negative somewhere for weights that no policy
        has.
    """
    return weight_SA.sum(axis=1) - mdp.gamma * np.einsum("sa,sat->t", weight_SA, mdp.transition_SAS)
