"""Soft values and soft Bellman operators (Eq. 1, 2, 6 and 9), of a policy and of the optimum."""

# S states, A actions

from __future__ import annotations

import numpy as np

from openrlhf_bd.theory.mdp import Array, Mask, TabularMDP, next_mean, top_p_mdp
from openrlhf_bd.theory.sets import mask, project


def soft_value(q_SA: Array) -> Array:
    """V^Q(s) = log sum_a exp Q(s, a), the largest soft value at these Q (below Eq. 5).

    Args:
        q_SA: Q, nats; -inf where an action is not available, at least one finite entry a state.

    Returns:
        [S], nats.
    """
    largest_S1 = q_SA.max(axis=1, keepdims=True)
    value_S: Array = np.log(np.exp(q_SA - largest_S1).sum(axis=1)) + largest_S1[:, 0]
    return value_S


def soft_policy(q_SA: Array) -> Array:
    """pi_Q(a | s) = exp(Q(s, a) - V^Q(s)); 0 where Q is -inf. [S, A]."""
    # Divided by its sum: V is rounded to its last digit, and a thousand nats times that would show in E[Q].
    weight_SA = np.exp(q_SA - q_SA.max(axis=1, keepdims=True))
    return weight_SA / weight_SA.sum(axis=1, keepdims=True)


def policy_value(q_SA: Array, policy_SA: Array) -> Array:
    """V^pi(s) = E_{a ~ pi}[Q(s, a) - log pi(a | s)] (Eq. 2).

    Args:
        q_SA: Q, nats; finite wherever the policy has mass.
        policy_SA: pi.

    Returns:
        [S], nats.
    """
    used_SA = policy_SA > 0
    gain_SA = np.where(used_SA, q_SA, 0.0) - np.log(np.where(used_SA, policy_SA, 1.0))
    value_S: Array = (policy_SA * gain_SA).sum(axis=1)
    return value_S


def soft_backup(mdp: TabularMDP, q_SA: Array, policy_SA: Array) -> Array:
    """Soft Bellman operator of a policy (Eq. 6).

    (B^pi Q)(s, a) = r(s, a) + gamma E_{a' ~ pi(s')}[Q(s', a') - log pi(a' | s')]

    Args:
        mdp: M; its rewards and transitions.
        q_SA: Q, nats.
        policy_SA: pi, with mass on available actions alone.

    Returns:
        [S, A], nats; -inf where an action is not available.
    """
    return _backup(mdp, policy_value(q_SA, policy_SA))


def optimal_soft_backup(mdp: TabularMDP, q_SA: Array) -> Array:
    """Soft Bellman optimality operator: Eq. 6 at the best policy for Q, which is pi_Q.

    (B Q)(s, a) = r(s, a) + gamma log sum_{a'} exp Q(s', a')

    Args:
        mdp: M, or M_p for the optimality version of Eq. 9.
        q_SA: Q, nats; -inf where an action is not available.

    Returns:
        [S, A], nats; -inf where an action is not available.
    """
    return _backup(mdp, soft_value(q_SA))


def top_p_soft_backup(mdp: TabularMDP, q_SA: Array, policy_SA: Array, sets_SA: Mask) -> Array:
    """Top-p soft Bellman operator of a policy (Def. 4, Eq. 9).

    (B_p^pi Q)(s, a) = r(s, a) + gamma E_{a' ~ proj_p pi}[Q(s', a') - log proj_p pi(a' | s')],  a in A_p(s)

    Args:
        mdp: M.
        q_SA: Q on the sets, nats; entries outside are not read.
        policy_SA: pi on M; it is projected here.
        sets_SA: the candidate sets.

    Returns:
        [S, A], nats; -inf outside the sets.
    """
    return soft_backup(top_p_mdp(mdp, sets_SA), q_SA, project(policy_SA, sets_SA))


def top_p_optimal_soft_backup(mdp: TabularMDP, q_SA: Array, sets_SA: Mask) -> Array:
    """Optimality operator of M_p: Eq. 9 at the best policy on the sets.

    (B_p Q)(s, a) = r(s, a) + gamma log sum_{a' in A_p(s')} exp Q(s', a'),  a in A_p(s)

    Args:
        mdp: M.
        q_SA: Q on the sets, nats; entries outside are not read.
        sets_SA: the candidate sets.

    Returns:
        [S, A], nats; -inf outside the sets.
    """
    return optimal_soft_backup(top_p_mdp(mdp, sets_SA), mask(q_SA, sets_SA))


def inverse_soft_backup(mdp: TabularMDP, q_SA: Array) -> Array:
    """Reward that Q implies, (T Q)(s, a) = Q(s, a) - gamma E[V^Q(s')] (below Eq. 5).

    Args:
        mdp: M or M_p; its rewards are not read.
        q_SA: Q, nats; -inf where an action is not available.

    Returns:
        [S, A], nats; 0 where an action is not available.
    """
    reward_SA = np.where(mdp.available_SA, q_SA, 0.0) - mdp.gamma * next_mean(mdp, soft_value(q_SA))
    return np.where(mdp.available_SA, reward_SA, 0.0)


def _backup(mdp: TabularMDP, value_S: Array) -> Array:
    return mask(mdp.reward_SA + mdp.gamma * next_mean(mdp, value_S), mdp.available_SA)
