"""Proposition 1: the soft Bellman operators contract with modulus gamma in the supported infinity-norm."""

from functools import partial

import numpy as np
import pytest

from openrlhf_bd.theory.mdp import top_p_mdp
from openrlhf_bd.theory.operators import (
    optimal_soft_backup,
    soft_backup,
    top_p_optimal_soft_backup,
    top_p_soft_backup,
)
from openrlhf_bd.theory.random_mdps import random_mdps
from openrlhf_bd.theory.sets import project, supported_norm, top_p_sets
from openrlhf_bd.theory.solve import evaluate_policy, iterate, solve_optimal


def pairs(rng, mdp):
    """Two Q that are far apart, and a policy that has nothing to do with the teacher."""
    shape = (mdp.num_states, mdp.num_actions)
    first_SA, second_SA = rng.normal(size=(2, *shape)) * 10 ** rng.uniform(-2, 2)
    return first_SA, second_SA, rng.dirichlet(np.ones(shape[1]), size=shape[0])


@pytest.mark.parametrize("gamma", [0.3, 0.9, 0.99])
def test_operators_contract(gamma):
    """Prop. 1: |B_p Q - B_p Q'| <= gamma |Q - Q'| on the sets, for any policy, and for the optimality operators."""
    rng = np.random.default_rng(3)
    for mdp in random_mdps(300, seed=3, gamma=gamma):
        first_SA, second_SA, policy_SA = pairs(rng, mdp)
        sets_SA = top_p_sets(rng.dirichlet(np.ones(mdp.num_actions), size=mdp.num_states), rng.uniform(0.2, 1))
        for on_SA, operator in (
            (mdp.available_SA, partial(soft_backup, policy_SA=policy_SA)),
            (mdp.available_SA, optimal_soft_backup),
            (sets_SA, partial(top_p_soft_backup, policy_SA=policy_SA, sets_SA=sets_SA)),
            (sets_SA, partial(top_p_optimal_soft_backup, sets_SA=sets_SA)),
        ):
            distance = supported_norm(first_SA - second_SA, on_SA)
            image_SA, second_image_SA = operator(mdp, first_SA), operator(mdp, second_SA)
            after = np.abs(image_SA[on_SA] - second_image_SA[on_SA]).max()
            assert after <= gamma * distance * (1 + 1e-12) + 1e-12


def test_modulus_is_gamma_where_nothing_ends():
    """Raising every Q by one constant raises its image by gamma times that: the modulus is not less than gamma."""
    rng = np.random.default_rng(5)
    for mdp in random_mdps(200, seed=5, gamma=0.9, terminating=False):
        q_SA, _, policy_SA = pairs(rng, mdp)
        sets_SA = top_p_sets(policy_SA, 0.7)
        before, after = (top_p_soft_backup(mdp, x_SA, policy_SA, sets_SA) for x_SA in (q_SA, q_SA + 3.0))
        np.testing.assert_allclose(after[sets_SA] - before[sets_SA], 0.9 * 3.0, atol=1e-10)


def test_expected_q_of_the_soft_policy_is_no_contraction():
    """Without the entropy, E_{pi_Q}[Q] can expand: the operator that the paper calls non-contractive is this one.

    Actions (x, 0) at x = 4: pi = (.98201, .01799), E = 3.92806; the slope along (+1, -1) is
    .98201 (1 + 4 - 3.92806) - .01799 (1 + 0 - 3.92806) = 1.05268 + .05267 = 1.10535 > 1 / .99.
    """

    def boltzmann(q):
        weights = np.exp(q - q.max())
        return float((weights / weights.sum()) @ q)

    step = np.array([1e-4, -1e-4])
    slope = (boltzmann(np.array([4.0, 0.0]) + step) - boltzmann(np.array([4.0, 0.0]) - step)) / 2e-4
    assert slope == pytest.approx(1.10535, abs=1e-4)
    assert 0.99 * slope > 1


@pytest.mark.parametrize("gamma", [0.4, 0.9])
def test_banach_iteration_finds_the_same_fixed_points(gamma):
    """Iterating Eq. 6 and 9 from far away ends where policy iteration and the linear system end."""
    rng = np.random.default_rng(7)
    for mdp in random_mdps(100, seed=7, gamma=gamma):
        start_SA, _, policy_SA = pairs(rng, mdp)
        teacher_SA = solve_optimal(mdp).policy_SA
        sets_SA = top_p_sets(teacher_SA, 0.8)
        inside = top_p_mdp(mdp, sets_SA)
        masked_SA = np.where(sets_SA, start_SA, -np.inf)
        for operator, first_SA, expected in (
            (partial(optimal_soft_backup, mdp), start_SA, solve_optimal(mdp)),
            (partial(soft_backup, mdp, policy_SA=policy_SA), start_SA, evaluate_policy(mdp, policy_SA)),
            (partial(optimal_soft_backup, inside), masked_SA, solve_optimal(inside)),
            (
                partial(top_p_soft_backup, mdp, policy_SA=teacher_SA, sets_SA=sets_SA),
                masked_SA,
                evaluate_policy(inside, project(teacher_SA, sets_SA)),
            ),
        ):
            q_SA, residual, _ = iterate(operator, first_SA, tolerance=1e-10)
            bound = (residual + expected.residual) / (1 - gamma)
            on_SA = np.isfinite(expected.q_SA)
            assert np.array_equal(np.isfinite(q_SA), on_SA)
            assert np.abs(q_SA[on_SA] - expected.q_SA[on_SA]).max() <= bound + 1e-10
