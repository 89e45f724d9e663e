"""The ends of the discount: gamma = 0, and gamma = 1 where everything ends."""

from dataclasses import replace

import numpy as np

from openrlhf_bd.theory.bounds import kappa
from openrlhf_bd.theory.mdp import TabularMDP, top_p_mdp
from openrlhf_bd.theory.random_mdps import random_mdps, random_prefix_tree
from openrlhf_bd.theory.sets import project, top_p_sets
from openrlhf_bd.theory.solve import solve_optimal


def chance_of_staying(mdp, teacher_SA, sets_SA):
    """h(s): probability that the teacher never takes an action outside the sets before the end, [S]."""
    inside_SA = np.where(sets_SA, teacher_SA, 0.0)
    ends_SA = 1 - mdp.transition_SAS.sum(axis=2)
    system_SS = np.eye(mdp.num_states) - np.einsum("sa,sat->st", inside_SA, mdp.transition_SAS)
    return np.linalg.solve(system_SS, (inside_SA * ends_SA).sum(axis=1))


def conditioned_teacher(mdp, teacher_SA, sets_SA):
    """The teacher given that it never leaves the sets: pi*(a | s) E[h(s')] / h(s) on them."""
    stays_S = chance_of_staying(mdp, teacher_SA, sets_SA)
    ahead_SA = mdp.transition_SAS @ stays_S + 1 - mdp.transition_SAS.sum(axis=2)
    return np.where(sets_SA, teacher_SA * ahead_SA, 0.0) / stays_S[:, None]


def test_gamma_zero_gives_the_projected_teacher(solve):
    """gamma = 0: pi_p* = proj pi*, Q_p* = Q* on the sets, V* - V_p* = -log P(s)."""
    for mdp in random_mdps(300, seed=20, gamma=0.0):
        case = solve(mdp, 0.8)
        projected_SA = project(case.optimum.policy_SA, case.sets_SA)
        np.testing.assert_allclose(case.restricted.policy_SA, projected_SA, atol=1e-12)
        np.testing.assert_array_equal(case.restricted.q_SA[case.sets_SA], case.optimum.q_SA[case.sets_SA])
        mass_S = np.where(case.sets_SA, case.optimum.policy_SA, 0.0).sum(axis=1)
        np.testing.assert_allclose(case.optimum.value_S - case.restricted.value_S, -np.log(mass_S), atol=1e-12)
        assert kappa(0.8, 0.0) == 0.0


def test_gamma_one_conditions_the_teacher_on_staying(solve):
    """gamma = 1, deterministic, ending: pi_p* = the teacher given that it never leaves; V* - V_p* = -log h(s)."""
    for mdp in random_mdps(300, seed=21, gamma=1.0, terminating=True, deterministic=True):
        case = solve(mdp, 0.7)
        teacher_SA = case.optimum.policy_SA
        stays_S = chance_of_staying(mdp, teacher_SA, case.sets_SA)
        np.testing.assert_allclose(case.optimum.value_S - case.restricted.value_S, -np.log(stays_S), atol=1e-9)
        expected_SA = conditioned_teacher(mdp, teacher_SA, case.sets_SA)
        np.testing.assert_allclose(case.restricted.policy_SA, expected_SA, atol=1e-9)


def test_gamma_one_of_a_language_model_by_enumeration():
    """gamma = 1, prefixes: responses that never leave the sets keep their ratios, all others vanish under pi_p*."""
    rng = np.random.default_rng(22)
    for _ in range(100):
        tree = random_prefix_tree(rng, num_tokens=3, depth=3, gamma=1.0)
        teacher_SA = solve_optimal(tree.mdp).policy_SA
        sets_SA = top_p_sets(teacher_SA, 0.75)
        learner_SA = solve_optimal(top_p_mdp(tree.mdp, sets_SA)).policy_SA
        state_of = {prefix: state for state, prefix in enumerate(tree.prefixes)}
        longer = [(*prefix, token) for prefix in tree.prefixes for token in range(3)]
        responses = [response for response in longer if response not in state_of]
        assert len(responses) == 1 + 2 + 4 * 3
        teacher, learner, stays = (
            np.array([np.prod([table_SA[state_of[r[:t]], r[t]] for t in range(len(r))]) for r in responses])
            for table_SA in (teacher_SA, learner_SA, sets_SA)
        )
        np.testing.assert_allclose(teacher.sum(), 1.0)
        np.testing.assert_allclose(learner, teacher * stays / (teacher * stays).sum(), atol=1e-10)


def test_gamma_one_needs_certain_transitions(solve):
    """Where luck decides between states of unequal h, pi_p* is not the conditioned teacher: V* - V_p* > -log h(s).

    Conditioning would also keep the lucky transitions; a policy can't choose those, and pays E[-log h] > -log E[h].
    """
    for mdp in random_mdps(300, seed=23, gamma=1.0, terminating=True, deterministic=False):
        case = solve(mdp, 0.7)
        teacher_SA = case.optimum.policy_SA
        stays_S = chance_of_staying(mdp, teacher_SA, case.sets_SA)
        excess_S = case.optimum.value_S - case.restricted.value_S + np.log(stays_S)
        assert excess_S.min() >= -1e-9
        # Every action may end or go on, and going on costs something unless nothing is ever missing.
        assert (excess_S.max() > 1e-9) == (stays_S.min() < 1 - 1e-9)
        if stays_S.min() < 0.8:
            expected_SA = conditioned_teacher(mdp, teacher_SA, case.sets_SA)
            several_S = case.sets_SA.sum(axis=1) > 1
            assert not several_S.any() or np.abs(case.restricted.policy_SA - expected_SA).max() > 1e-9


def test_gamma_one_allows_luck_among_equals(solve):
    """The exact condition: every action's next states have the same h. Here luck picks one of two equal copies."""
    rng = np.random.default_rng(24)
    for mdp in random_mdps(200, seed=24, gamma=1.0, terminating=True, deterministic=True):
        case = solve(with_two_copies(rng, mdp), 0.7)
        teacher_SA = case.optimum.policy_SA
        expected_SA = conditioned_teacher(case.mdp, teacher_SA, case.sets_SA)
        np.testing.assert_allclose(case.restricted.policy_SA, expected_SA, atol=1e-9)


def with_two_copies(rng: np.random.Generator, mdp: TabularMDP) -> TabularMDP:
    """Each state twice, 2 s and 2 s + 1; an action leads to either copy of its next state, by luck."""
    num_states, num_actions = mdp.reward_SA.shape
    twice_SAS = mdp.transition_SAS.repeat(2, axis=0).repeat(2, axis=2)
    share_SA = rng.uniform(size=(2 * num_states, num_actions, 1))
    first_S = np.arange(2 * num_states) % 2 == 0
    return replace(
        mdp,
        transition_SAS=twice_SAS * np.where(first_S, share_SA, 1 - share_SA),
        reward_SA=mdp.reward_SA.repeat(2, axis=0),
        start_S=mdp.start_S.repeat(2) / 2,
        available_SA=mdp.available_SA.repeat(2, axis=0),
    )
