"""Teacher's and student's responses in one batch: what chi-squared on both (LS-IQ's mixture) makes of the reward."""

import numpy as np
import pytest

from openrlhf_bd.theory.imitation import imitation_optimum
from openrlhf_bd.theory.mdp import top_p_mdp
from openrlhf_bd.theory.occupancy import expert_occupancy, occupancy, source
from openrlhf_bd.theory.operators import inverse_soft_backup
from openrlhf_bd.theory.random_mdps import random_mdps
from openrlhf_bd.theory.sets import top_p_sets
from openrlhf_bd.theory.solve import solve_optimal

GAMMA = 0.9


def problems(count, *, seed):
    """MDPs with the occupancies of their soft-optimal teacher and of some student."""
    rng = np.random.default_rng(seed)
    for mdp in random_mdps(count, seed=seed, gamma=GAMMA, num_states=4, num_actions=4):
        teacher_SA = solve_optimal(mdp).policy_SA
        student_SA = rng.dirichlet(np.ones(mdp.num_actions), size=mdp.num_states)
        yield mdp, teacher_SA, expert_occupancy(mdp, teacher_SA), expert_occupancy(mdp, student_SA)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8])
def test_reward_of_the_mixture(beta, top_p):
    """At the optimum r = 2 (1 - beta) alpha (rho_E - rho_pi) / ((1 - beta) rho_E + beta rho_S), whoever S is."""
    for full, teacher_SA, expert_SA, student_SA in problems(60, seed=50):
        sets_SA = top_p_sets(teacher_SA, top_p)
        mdp = top_p_mdp(full, sets_SA)
        expert_SA, student_SA = (np.where(sets_SA, rho_SA, 0.0) for rho_SA in (expert_SA, student_SA))
        mixture_SA = (1 - beta) * expert_SA + beta * student_SA
        found = imitation_optimum(mdp, (1 - beta) * expert_SA, alpha=0.7, chi_SA=mixture_SA)
        learner_SA = occupancy(mdp, found.policy_SA, source(mdp, expert_SA))
        reward_SA = inverse_soft_backup(mdp, found.q_SA)
        expected_SA = 2 * 0.7 * (1 - beta) * (expert_SA - learner_SA)
        np.testing.assert_allclose((mixture_SA * reward_SA)[sets_SA], expected_SA[sets_SA], atol=1e-9)


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8])
def test_reward_is_bounded_on_the_students_own_visits(beta):
    """Where the student that samples is the learner itself, -2 alpha (1 - beta) / beta <= r <= 2 alpha."""
    alpha, tightest = 0.1, 0.0
    for mdp, _, expert_SA, student_SA in problems(30, seed=51):
        for _ in range(300):
            found = imitation_optimum(
                mdp, (1 - beta) * expert_SA, alpha=alpha, chi_SA=(1 - beta) * expert_SA + beta * student_SA
            )
            learner_SA = expert_occupancy(mdp, found.policy_SA)
            if np.abs(learner_SA - student_SA).max() < 1e-9:
                break
            student_SA = 0.5 * (student_SA + learner_SA)
        np.testing.assert_allclose(learner_SA, student_SA, atol=1e-7)
        reward_SA = inverse_soft_backup(mdp, found.q_SA)
        assert reward_SA.max() <= 2 * alpha + 1e-5
        assert reward_SA.min() >= -2 * alpha * (1 - beta) / beta - 1e-5
        tightest = max(tightest, reward_SA.max() / (2 * alpha))
    assert tightest > 0.5  # the bound is no idle one
