"""What restriction to candidate sets costs: bounds of Propositions 2-4, and the exact cost.

The teacher is soft-optimal at temperature 1 throughout: Q* = V* + log pi*. Then the cost depends on the teacher and the
transitions alone, whatever the rewards. V is -log P(s) farther from V* than Q is: kappa bounds differences of Q,
kappa + (-log p) = kappa / gamma those of V.
"""

# S states, A actions

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from openrlhf_bd.theory.mdp import Array, Mask, TabularMDP, discounted_sum, next_mean, top_p_mdp
from openrlhf_bd.theory.sets import project, set_mass
from openrlhf_bd.theory.solve import solve_optimal


def kappa(mass: float, gamma: float) -> float:
    """kappa(p) = -gamma / (1 - gamma) log p (Prop. 2), nats.

    Args:
        mass: p; or min_s P(s), which gives the finer bound and holds for any sets.
        gamma: discount in [0, 1).
    """
    return -gamma / (1.0 - gamma) * math.log(mass)


def policy_cost(mdp: TabularMDP, teacher_SA: Array, policy_SA: Array) -> Array:
    """V* - V^pi of any policy: its discounted divergence from the teacher.

    V*(s) - V^pi(s) = E_pi[ sum_t gamma^t KL(pi(s_t) || pi*(s_t)) | s_0 = s ]

    Returns:
        [S], nats, >= 0.
    """
    used_SA = policy_SA > 0
    ratio_SA = np.log(np.where(used_SA, policy_SA, 1.0)) - np.log(np.where(used_SA, teacher_SA, 1.0))
    return discounted_sum(mdp, policy_SA, (policy_SA * ratio_SA).sum(axis=1))


def projection_cost(mdp: TabularMDP, teacher_SA: Array, sets_SA: Mask) -> Array:
    """V* - V^{proj pi*}: the divergence of the projected teacher is -log P(s), so this is policy_cost of it.

    V*(s) - Vhat(s) = E_{proj pi*}[ sum_t gamma^t (-log P(s_t)) | s_0 = s ]

    Args:
        mdp: M; its rewards are not read.
        teacher_SA: pi*.
        sets_SA: any sets, top-p or not.

    Returns:
        [S], nats, >= 0.
    """
    return discounted_sum(mdp, project(teacher_SA, sets_SA), -np.log(set_mass(teacher_SA, sets_SA)))


def restriction_cost(mdp: TabularMDP, teacher_SA: Array, sets_SA: Mask) -> Array:
    """V* - V_p*: the least discounted divergence from the teacher that a policy on the sets can have.

    g(s) = -log sum_{a in A_p(s)} pi*(a | s) exp(-gamma E[g(s')])

    That is -V_p* of the MDP whose rewards are log pi*(a | s): there V* = 0.

    Args:
        mdp: M; its rewards are not read.
        teacher_SA: pi*, positive on the sets.
        sets_SA: any sets.

    Returns:
        [S], nats, >= 0.
    """
    log_teacher_SA = np.log(np.where(sets_SA, teacher_SA, 1.0))
    return -solve_optimal(top_p_mdp(replace(mdp, reward_SA=log_teacher_SA), sets_SA)).value_S


def lower_bound(mdp: TabularMDP, teacher_SA: Array, sets_SA: Mask) -> Array:
    """What Q* - Q_p* is at least: the mass that is missing one step ahead.

    gamma E[-log P(s')] <= Q*(s, a) - Q_p*(s, a)

    Returns:
        [S, A], nats, >= 0; 0 where the action ends.
    """
    return mdp.gamma * next_mean(mdp, -np.log(set_mass(teacher_SA, sets_SA)))
