"""Propositions 2-4, the exact cost of restriction, and what the bounds need in order to hold."""

from dataclasses import replace

import numpy as np
import pytest

from openrlhf_bd.theory.bounds import kappa, lower_bound, policy_cost, projection_cost, restriction_cost
from openrlhf_bd.theory.gaps import exclusive_gap, measure_gaps
from openrlhf_bd.theory.mdp import TabularMDP, top_p_mdp
from openrlhf_bd.theory.occupancy import occupancy
from openrlhf_bd.theory.operators import soft_policy
from openrlhf_bd.theory.random_mdps import random_mdps
from openrlhf_bd.theory.sets import project, set_mass, top_p_sets
from openrlhf_bd.theory.solve import evaluate_policy, solve_optimal


def gap(case, other):
    """Q* - Q on the sets, [M]."""
    return (case.optimum.q_SA - np.where(case.sets_SA, other.q_SA, 0.0))[case.sets_SA]


def test_projected_teacher_is_near_optimal(cases):
    """Prop. 2: |Q* - Q^{proj pi*}| <= kappa(p) on the sets."""
    assert len(cases) == 2160
    for case in cases:
        assert np.abs(gap(case, case.projected)).max() <= kappa(case.top_p, case.mdp.gamma) + case.error


def test_sandwich(cases):
    """Prop. 3: Q^{proj pi*} <= Q_p* <= Q* on the sets."""
    for case in cases:
        assert gap(case, case.restricted).min() >= -case.error
        assert (gap(case, case.projected) - gap(case, case.restricted)).min() >= -case.error


def test_optimum_on_the_sets_is_near_optimal(cases):
    """Prop. 4: |Q* - Q_p*| <= kappa(p) on the sets."""
    for case in cases:
        assert np.abs(gap(case, case.restricted)).max() <= kappa(case.top_p, case.mdp.gamma) + case.error


def test_gap_has_a_lower_bound(cases):
    """Q* - Q_p* >= gamma E[-log P(s')]: what is missing one step ahead is lost whatever the policy."""
    for case in cases:
        lower_SA = lower_bound(case.mdp, case.optimum.policy_SA, case.sets_SA)
        assert (gap(case, case.restricted) - lower_SA[case.sets_SA]).min() >= -case.error


def test_exact_cost_of_projection(cases):
    """V* - Vhat = E_{proj pi*}[sum gamma^t (-log P(s_t))], and Q* - Qhat is gamma times its mean one step ahead."""
    for case in cases:
        cost_S = projection_cost(case.mdp, case.optimum.policy_SA, case.sets_SA)
        np.testing.assert_allclose(case.optimum.value_S - case.projected.value_S, cost_S, rtol=0, atol=case.error)
        ahead_SA = case.mdp.gamma * case.mdp.transition_SAS @ cost_S
        np.testing.assert_allclose(gap(case, case.projected), ahead_SA[case.sets_SA], rtol=0, atol=case.error)


def test_exact_cost_of_restriction(cases):
    """V* - V_p* = g with g(s) = -log sum_{A_p(s)} pi* exp(-gamma E g(s')): rewards matter through the teacher alone."""
    for case in cases:
        cost_S = restriction_cost(case.mdp, case.optimum.policy_SA, case.sets_SA)
        np.testing.assert_allclose(case.optimum.value_S - case.restricted.value_S, cost_S, rtol=0, atol=2 * case.error)


def test_exact_cost_of_any_policy(cases):
    """V* - V^pi = E_pi[sum gamma^t KL(pi || pi*)] for any policy; the optimum on the sets has the least."""
    rng = np.random.default_rng(1)
    for case in cases[::4]:
        shape = case.mdp.reward_SA.shape
        for policy_SA in (
            rng.dirichlet(np.ones(shape[1]), size=shape[0]),
            project(rng.dirichlet(np.ones(shape[1]), size=shape[0]), case.sets_SA),
        ):
            cost_S = policy_cost(case.mdp, case.optimum.policy_SA, policy_SA)
            value_S = evaluate_policy(case.mdp, policy_SA).value_S
            np.testing.assert_allclose(case.optimum.value_S - value_S, cost_S, rtol=0, atol=2 * case.error)
        assert (case.optimum.value_S - case.restricted.value_S <= cost_S + case.error).all()


def test_values_differ_by_one_step_more(cases):
    """V* - Vhat <= -log p / (1 - gamma) = kappa / gamma, and it does exceed kappa: kappa bounds differences of Q."""
    exceeds = 0
    for case in cases:
        largest = (case.optimum.value_S - case.projected.value_S).max()
        assert largest <= kappa(case.top_p, case.mdp.gamma) / case.mdp.gamma + case.error
        exceeds += largest > kappa(case.top_p, case.mdp.gamma) + case.error
    assert exceeds > 100


def test_any_sets(solve):
    """The finer bound, the sandwich, the lower bound and the identities ask nothing of the sets: here random ones."""
    rng = np.random.default_rng(2)
    for mdp in random_mdps(300, seed=2, gamma=0.9):
        sets_SA = rng.random(mdp.reward_SA.shape) < rng.uniform(0.2, 0.9)
        sets_SA[np.arange(mdp.num_states), rng.integers(mdp.num_actions, size=mdp.num_states)] = True
        case = solve(mdp, 0.5, sets_SA=sets_SA)
        bound = kappa(float(set_mass(case.optimum.policy_SA, sets_SA).min()), 0.9)
        assert gap(case, case.projected).max() <= bound + case.error
        assert (gap(case, case.projected) - gap(case, case.restricted)).min() >= -case.error
        lower_SA = lower_bound(mdp, case.optimum.policy_SA, sets_SA)
        assert (gap(case, case.restricted) - lower_SA[sets_SA]).min() >= -case.error
        for cost, found in ((projection_cost, case.projected), (restriction_cost, case.restricted)):
            cost_S = cost(mdp, case.optimum.policy_SA, sets_SA)
            np.testing.assert_allclose(case.optimum.value_S - found.value_S, cost_S, rtol=0, atol=2 * case.error)


def test_finer_bound_of_top_p_sets(cases):
    """kappa(min_s P(s)) <= kappa(p), and holds."""
    for case in cases:
        finer = kappa(float(set_mass(case.optimum.policy_SA, case.sets_SA).min()), case.mdp.gamma)
        assert finer <= kappa(case.top_p, case.mdp.gamma) + 1e-9
        assert np.abs(gap(case, case.projected)).max() <= finer + case.error


def test_bound_is_tight(solve):
    """Where every set has mass exactly p and nothing ends, both gaps are kappa(p) in every state and action."""
    rng = np.random.default_rng(4)
    for mdp in random_mdps(200, seed=4, gamma=0.95, terminating=False):
        # The teacher (.45, .35, .15, .04, .01) in some order is soft-optimal for r = Q - gamma E V, V = log 1 = 0.
        teacher_SA = rng.permuted(np.tile([0.45, 0.35, 0.15, 0.04, 0.01], (mdp.num_states, 1)), axis=1)
        case = solve(replace(mdp, reward_SA=np.log(teacher_SA)), 0.8, sets_SA=teacher_SA > 0.3)
        for other in (case.projected, case.restricted):
            np.testing.assert_allclose(gap(case, other), kappa(0.8, 0.95), rtol=1e-9)


def test_more_candidates_keep_the_bound(solve):
    """Ids that are always included, and the union over states that the paper's proof takes, keep Prop. 2 and 4."""
    for mdp in random_mdps(200, seed=6, gamma=0.9):
        optimum = solve_optimal(mdp)
        sets_SA = top_p_sets(optimum.policy_SA, 0.7)
        with_first_SA = sets_SA.copy()
        with_first_SA[:, 0] = True
        union_SA = np.broadcast_to(sets_SA.any(axis=0), sets_SA.shape)
        for wider_SA in (with_first_SA, union_SA):
            case = solve(mdp, 0.7, optimum, wider_SA)
            assert np.abs(gap(case, case.projected)).max() <= kappa(0.7, 0.9) + case.error
            assert np.abs(gap(case, case.restricted)).max() <= kappa(0.7, 0.9) + case.error


def test_wider_sets_never_hurt_the_optimum(solve):
    """A_p inside A_p' gives Q_p* <= Q_p'*."""
    for mdp in random_mdps(200, seed=8, gamma=0.9):
        optimum = solve_optimal(mdp)
        narrow, wide = (solve(mdp, top_p, optimum) for top_p in (0.5, 0.8))
        rise_SA = wide.restricted.value_S - narrow.restricted.value_S
        assert rise_SA.min() >= -narrow.error


def test_wider_sets_can_hurt_the_projected_teacher():
    """A larger p can cost the projected teacher more: a new action leads where much is missing.

    State 0: .95 to the end, .05 to state 1, which stays for ever and has mass .96 on its set at either p.
    p = .95: {end}, cost -log .95 = .0513. p = .96: both, cost .99 * .05 * (-log .96) / .01 = .2021.
    """
    teacher_SA = np.array([[0.95, 0.05, 0.0, 0.0], [0.50, 0.46, 0.03, 0.01]])
    transition_SAS = np.zeros((2, 4, 2))
    transition_SAS[0, 1, 1] = transition_SAS[1, :, 1] = 1.0
    zeros_SA = np.zeros((2, 4))
    mdp = TabularMDP(transition_SAS, zeros_SA, 0.99, np.array([1.0, 0.0]), np.ones((2, 4), dtype=bool))
    costs = [projection_cost(mdp, teacher_SA, top_p_sets(teacher_SA, top_p))[0] for top_p in (0.95, 0.96)]
    np.testing.assert_allclose(costs, [0.05129, 0.20207], atol=1e-5)


def test_exclusive_sets_break_the_bound(cases):
    """Without the action that crosses p most MDPs that never end break Prop. 2; with it none does."""
    for gamma in (0.4, 0.9, 0.99):
        same = [case for case in cases if case.mdp.gamma == gamma and case.mdp.transition_SAS.sum(axis=2).min() > 0.999]
        assert len(same) == 360
        broken = [
            exclusive_gap(case.mdp, case.optimum, case.top_p) > kappa(case.top_p, gamma) + case.error for case in same
        ]
        assert np.mean(broken) > 0.6


def test_exclusive_sets_of_less_than_p_always_break_the_bound():
    """Where every exclusive set holds less than p and nothing ends, Prop. 2 fails with certainty."""
    num_found = 0
    for mdp in random_mdps(400, seed=9, gamma=0.9, terminating=False):
        optimum = solve_optimal(mdp)
        sets_SA = top_p_sets(optimum.policy_SA, 0.9, inclusive=False)
        if set_mass(optimum.policy_SA, sets_SA).max() < 0.9:
            num_found += 1
            assert exclusive_gap(mdp, optimum, 0.9) > kappa(0.9, 0.9)
    assert num_found > 100


def test_teacher_must_be_optimal_at_temperature_one(solve):
    """Sets of a sharpened or flattened policy, projected, break Prop. 2 in many MDPs, whatever their mass."""
    for temperature in (0.3, 3.0):
        broken = []
        for mdp in random_mdps(200, seed=10, gamma=0.9, terminating=False):
            optimum = solve_optimal(mdp)
            other_SA = soft_policy(optimum.q_SA / temperature)
            sets_SA = top_p_sets(other_SA, 0.9)
            q_SA = evaluate_policy(top_p_mdp(mdp, sets_SA), project(other_SA, sets_SA)).q_SA
            difference = (optimum.q_SA - np.where(sets_SA, q_SA, 0.0))[sets_SA]
            broken.append(np.abs(difference).max() > kappa(0.9, 0.9) + 1e-6)
        assert np.mean(broken) > 0.5


def test_values_from_occupancy(cases):
    """V^pi(x) = sum rho_x^pi(s, a) (r(s, a) - log pi(a | s)), rho without the factor 1 - gamma."""
    for case in cases[::8]:
        policy_SA = case.optimum.policy_SA
        gain_SA = case.mdp.reward_SA - np.log(policy_SA)
        value_S = [(occupancy(case.mdp, policy_SA, start_S) * gain_SA).sum() for start_S in np.eye(case.mdp.num_states)]
        np.testing.assert_allclose(value_S, case.optimum.value_S, rtol=1e-9, atol=1e-7)


def test_command_measures_no_violation(cases):
    """What `openrlhf-bd theory` counts as violations is 0 for every MDP, and its numbers are those of these tests."""
    for case in cases[::3]:
        gaps = measure_gaps(case.mdp, case.optimum, case.top_p)
        assert gaps.violations == 0
        assert gaps.projected_gap == pytest.approx(np.abs(gap(case, case.projected)).max(), abs=1e-12)
        assert gaps.optimal_gap == pytest.approx(np.abs(gap(case, case.restricted)).max(), abs=1e-12)
        assert gaps.lower_bound - gaps.error <= gaps.optimal_gap <= gaps.projected_gap + gaps.error
        assert gaps.projected_gap <= gaps.kappa_mass + gaps.error
