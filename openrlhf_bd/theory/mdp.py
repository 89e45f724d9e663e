"""Finite MDPs, and the top-p MDP inside one."""

# S states, A actions

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class TabularMDP:
    """M = (S, A, P, r, gamma), with state-dependent actions and an end of value 0.

    Functions of (s, a), such as Q, are [S, A] arrays with -inf where an action is not available (Def. 7).

    Attributes:
        transition_SAS: P(s' | s, a); what a row lacks to 1 is the probability of ending there.
        reward_SA: r(s, a), nats.
        gamma: discount in [0, 1]; 1 only where every policy ends.
        start_S: distribution of s_0.
        available_SA: actions that exist in a state, at least one.
    """

    transition_SAS: Array
    reward_SA: Array
    gamma: float
    start_S: Array
    available_SA: Mask

    def __post_init__(self) -> None:
        num_states, num_actions = self.reward_SA.shape
        shapes = (self.transition_SAS.shape, self.start_S.shape, self.available_SA.shape)
        expected = ((num_states, num_actions, num_states), (num_states,), (num_states, num_actions))
        if shapes != expected:
            raise ValueError(f"transition, start and available have shapes {shapes}; rewards ask for {expected}")
        total_SA = self.transition_SAS.sum(axis=2)
        if (self.transition_SAS < 0).any() or total_SA.max() > 1 + 1e-9:
            raise ValueError(f"transition_SAS: rows sum to {total_SA.max():g} at most; expected probabilities")
        if not self.available_SA.any(axis=1).all():
            state = int(self.available_SA.any(axis=1).argmin())
            raise ValueError(f"state {state} has no action; expected at least one")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma}; it must be in [0, 1]")
        if self.gamma == 1 and not always_ends(self):
            raise ValueError("gamma is 1 and some policy never ends: its value is infinite; use gamma below 1")

    @property
    def num_states(self) -> int:
        return self.reward_SA.shape[0]

    @property
    def num_actions(self) -> int:
        return self.reward_SA.shape[1]


def top_p_mdp(mdp: TabularMDP, sets_SA: Mask) -> TabularMDP:
    """M_p: the same MDP with the actions of the candidate sets alone (Def. 2).

    Args:
        mdp: M.
        sets_SA: True where a is in A_p(s); at least one action a state, all of them available in M.

    Raises:
        ValueError: a set is empty.
    """
    return replace(mdp, available_SA=sets_SA & mdp.available_SA)


def next_mean(mdp: TabularMDP, x_S: Array) -> Array:
    """Mean of a function of the next state, 0 after the end.

    E_{s' ~ P(s, a)}[x(s')]        (x(s o a) where transitions concatenate)

    Returns:
        [S, A].
    """
    mean_SA: Array = mdp.transition_SAS @ x_S
    return mean_SA


def policy_transition(mdp: TabularMDP, policy_SA: Array) -> Array:
    """P_pi(s' | s) = sum_a pi(a | s) P(s' | s, a), [S, S]."""
    return np.einsum("sa,sat->st", policy_SA, mdp.transition_SAS)


def discounted_sum(mdp: TabularMDP, policy_SA: Array, x_S: Array) -> Array:
    """E_pi[ sum_t gamma^t x(s_t) | s_0 = s ] = (I - gamma P_pi)^-1 x, [S]."""
    system_SS = np.eye(mdp.num_states) - mdp.gamma * policy_transition(mdp, policy_SA)
    return np.asarray(np.linalg.solve(system_SS, x_S), dtype=np.float64)


def always_ends(mdp: TabularMDP) -> bool:
    """Whether every policy ends with probability 1: from no state can S actions be chosen that surely don't end."""
    alive_S = np.ones(len(mdp.start_S))
    for _ in range(len(mdp.start_S)):
        alive_S = np.where(mdp.available_SA, mdp.transition_SAS @ alive_S, 0.0).max(axis=1)
    return bool(alive_S.max() < 1 - 1e-9)
