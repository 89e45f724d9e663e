"""Inverse soft Q-learning in tables: what the optimum of Eq. 14 and 17 is."""

from dataclasses import replace

import numpy as np
import pytest

from openrlhf_bd.theory.imitation import (
    chi_squared_dual,
    imitation_gradient,
    imitation_objective,
    imitation_objective_at_starts,
    imitation_optimum,
    occupancy_from_reward,
)
from openrlhf_bd.theory.mdp import top_p_mdp
from openrlhf_bd.theory.occupancy import expert_occupancy, occupancy, source
from openrlhf_bd.theory.operators import inverse_soft_backup
from openrlhf_bd.theory.random_mdps import random_mdps
from openrlhf_bd.theory.sets import project, top_p_sets
from openrlhf_bd.theory.solve import solve_optimal

ALPHAS = (0.1, 0.5, 1.0, 5.0, 100.0)


def experts(count, *, seed, gamma=0.9):
    """MDPs with their soft-optimal teacher and its occupancy measure."""
    for mdp in random_mdps(count, seed=seed, gamma=gamma, num_states=4, num_actions=4):
        teacher_SA = solve_optimal(mdp).policy_SA
        yield mdp, teacher_SA, expert_occupancy(mdp, teacher_SA)


def mean_kl(rho_SA, teacher_SA, policy_SA):
    """E_{rho*}[log pi* - log pi], nats a step; policies may be projected."""
    on_SA = teacher_SA > 0
    ratio_SA = np.log(np.where(on_SA, teacher_SA, 1.0)) - np.log(np.where(on_SA, policy_SA, 1.0))
    return float((rho_SA * ratio_SA).sum() / rho_SA.sum())


def test_occupancy_is_a_measure():
    """rho* sums to 1 where nothing ends, has the teacher's conditionals, and its source is (1 - gamma) mu."""
    for mdp, teacher_SA, rho_SA in experts(300, seed=30):
        if mdp.transition_SAS.sum(axis=2).min() > 0.999:
            assert rho_SA.sum() == pytest.approx(1.0)
        np.testing.assert_allclose(rho_SA, rho_SA.sum(axis=1, keepdims=True) * teacher_SA, atol=1e-15)
        np.testing.assert_allclose(source(mdp, rho_SA), 0.1 * mdp.start_S, atol=1e-15)


def test_telescoping():
    """E_rho[V(s) - gamma V(s')] = (1 - gamma) E[V(s_0)]: Eq. 17 is Eq. 14, for any Q and any policy's occupancy."""
    rng = np.random.default_rng(31)
    for mdp, _, _ in experts(300, seed=31):
        q_SA = rng.normal(size=mdp.reward_SA.shape) * 3
        rho_SA = expert_occupancy(mdp, rng.dirichlet(np.ones(mdp.num_actions), size=mdp.num_states))
        both = [form(mdp, q_SA, rho_SA, alpha=0.7) for form in (imitation_objective, imitation_objective_at_starts)]
        assert both[0] == pytest.approx(both[1], rel=1e-10, abs=1e-10)


def test_telescoping_needs_the_normalised_occupancy():
    """With rho as the paper defines it, without 1 - gamma, Eq. 14's start term needs no factor 1 - gamma."""
    mdp, teacher_SA, _ = next(experts(1, seed=31))
    np.testing.assert_allclose(source(mdp, occupancy(mdp, teacher_SA, mdp.start_S)), mdp.start_S, atol=1e-12)


def test_gradient_is_that_of_the_objective():
    """The closed form equals central differences, at p = 1 and on sets, for occupancies and other weights."""
    rng = np.random.default_rng(32)
    for index, (full, teacher_SA, rho_SA) in enumerate(experts(100, seed=32)):
        sets_SA = top_p_sets(teacher_SA, (1.0, 0.7)[index % 2])
        mdp = top_p_mdp(full, sets_SA)
        weight_SA = np.where(sets_SA, rho_SA if index % 3 else rng.uniform(size=rho_SA.shape), 0.0)
        q_SA = np.where(sets_SA, rng.normal(size=rho_SA.shape), -np.inf)
        gradient_SA = imitation_gradient(mdp, q_SA, weight_SA, alpha=0.4)
        for state, action in zip(*np.nonzero(sets_SA), strict=True):
            step_SA = np.zeros_like(q_SA)
            step_SA[state, action] = 1e-5
            ends = [imitation_objective(mdp, q_SA + sign * step_SA, weight_SA, alpha=0.4) for sign in (1, -1)]
            assert gradient_SA[state, action] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)
        assert (gradient_SA[~sets_SA] == 0).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_stationarity(alpha):
    """At the optimum of p = 1: rho* (1 - r / (2 alpha)) = rho^pi, so r = 2 alpha (1 - rho^pi / rho*) < 2 alpha."""
    for mdp, _, rho_SA in experts(150, seed=33):
        found = imitation_optimum(mdp, rho_SA, alpha=alpha)
        learner_SA = expert_occupancy(mdp, found.policy_SA)
        np.testing.assert_allclose(occupancy_from_reward(mdp, found.q_SA, rho_SA, alpha=alpha), learner_SA, atol=1e-9)
        reward_SA = inverse_soft_backup(mdp, found.q_SA)
        np.testing.assert_allclose(rho_SA * reward_SA, 2 * alpha * (rho_SA - learner_SA), atol=1e-8 * alpha + 1e-9)
        assert reward_SA.max() < 2 * alpha


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_optimum_is_global(alpha):
    """No gap of duality: J = alpha chi^2(rho^pi, rho*) - H(pi) at the optimum, and every other policy pays more."""
    rng = np.random.default_rng(34)
    for mdp, teacher_SA, rho_SA in experts(100, seed=34):
        found = imitation_optimum(mdp, rho_SA, alpha=alpha)
        value = imitation_objective(mdp, found.q_SA, rho_SA, alpha=alpha)
        learner_SA = expert_occupancy(mdp, found.policy_SA)
        assert chi_squared_dual(mdp, learner_SA, rho_SA, alpha=alpha) == pytest.approx(value, abs=1e-7)
        for share in (0.01, 0.3, 1.0):
            noise_SA = rng.dirichlet(np.ones(mdp.num_actions), size=mdp.num_states)
            other_SA = (1 - share) * teacher_SA + share * noise_SA
            assert chi_squared_dual(mdp, expert_occupancy(mdp, other_SA), rho_SA, alpha=alpha) >= value - 1e-9


def test_large_alpha_recovers_the_teacher():
    """alpha -> infinity at p = 1: pi* itself."""
    for mdp, teacher_SA, rho_SA in experts(200, seed=35):
        found = imitation_optimum(mdp, rho_SA, alpha=1e6)
        np.testing.assert_allclose(found.policy_SA, teacher_SA, atol=1e-4)
        assert mean_kl(rho_SA, teacher_SA, found.policy_SA) < 1e-10


def test_large_alpha_recovers_the_projected_teacher():
    """alpha -> infinity at p < 1, actions outside the sets dropped: proj pi*."""
    for full, teacher_SA, rho_SA in experts(200, seed=36):
        sets_SA = top_p_sets(teacher_SA, 0.7)
        weight_SA = np.where(sets_SA, rho_SA, 0.0)
        found = imitation_optimum(top_p_mdp(full, sets_SA), weight_SA, alpha=1e6)
        projected_SA = project(teacher_SA, sets_SA)
        np.testing.assert_allclose(found.policy_SA, projected_SA, atol=1e-4)
        assert mean_kl(weight_SA, projected_SA, found.policy_SA) < 1e-10


def test_small_alpha_biases_the_optimum():
    """At p = 1 the optimum is not the teacher: as alpha grows chi-squared falls in every MDP, KL on average."""
    chi_squared, kl = [], []
    for mdp, teacher_SA, rho_SA in experts(150, seed=37):
        policies = [imitation_optimum(mdp, rho_SA, alpha=alpha).policy_SA for alpha in (*ALPHAS, 1000.0)]
        distance = [((expert_occupancy(mdp, policy_SA) - rho_SA) ** 2 / rho_SA).sum() for policy_SA in policies]
        chi_squared.append(distance)
        kl.append([mean_kl(rho_SA, teacher_SA, policy_SA) for policy_SA in policies])
    assert (np.diff(chi_squared, axis=1) <= 1e-12).all()
    mean = np.mean(kl, axis=0)
    assert (np.diff(mean) < 0).all()
    assert mean[0] > 0.1  # nats a step at the published alpha, .1
    assert mean[3] < 0.01  # at 5
    assert mean[4] / mean[5] == pytest.approx(100, rel=0.1)  # in the end as 1 / alpha^2: (1000 / 100)^2


def test_stationarity_on_sets():
    """At p < 1 the learner's occupancy starts where the kept weights do: source(w), which may be negative.

    rho* (1 - r / (2 alpha)) on the sets is the occupancy of pi from w(s) - gamma sum w P, w = rho* on the sets; it is
    not that from (1 - gamma) mu.
    """
    differs = 0
    for full, teacher_SA, rho_SA in experts(150, seed=38):
        sets_SA = top_p_sets(teacher_SA, 0.7)
        mdp, weight_SA = top_p_mdp(full, sets_SA), np.where(sets_SA, rho_SA, 0.0)
        found = imitation_optimum(mdp, weight_SA, alpha=5.0)
        left_SA = occupancy_from_reward(mdp, found.q_SA, weight_SA, alpha=5.0)
        right_SA = occupancy(mdp, found.policy_SA, source(mdp, weight_SA))
        np.testing.assert_allclose(left_SA, right_SA, atol=1e-9)
        differs += np.abs(left_SA - expert_occupancy(mdp, found.policy_SA)).max() > 1e-3
    assert differs > 100


def test_counting_tokens_alike_is_a_start_anywhere():
    """Visits d, each token of a response counting 1, are an occupancy measure from (1 - gamma) d + gamma mu.

    So the mean over tokens is Eq. 17 with a valid measure, although it has no weights gamma^t.
    """
    for mdp in random_mdps(200, seed=39, gamma=0.9, terminating=True):
        teacher_SA = solve_optimal(mdp).policy_SA
        visits_SA = expert_occupancy(replace(mdp, gamma=1.0), teacher_SA)
        starts_S = 0.1 * visits_SA.sum(axis=1) + 0.9 * mdp.start_S
        np.testing.assert_allclose(source(mdp, visits_SA), starts_S, atol=1e-12)
        np.testing.assert_allclose(occupancy(mdp, teacher_SA, starts_S), visits_SA, atol=1e-10)
