"""The functions of `openrlhf_bd.theory` on tables small enough to work out by hand."""

import subprocess
import sys

import numpy as np
import pytest

from openrlhf_bd.theory.bounds import kappa, lower_bound, policy_cost, projection_cost, restriction_cost
from openrlhf_bd.theory.gaps import measure_gaps
from openrlhf_bd.theory.imitation import chi_squared_dual, imitation_objective, imitation_optimum
from openrlhf_bd.theory.mdp import TabularMDP, always_ends, top_p_mdp
from openrlhf_bd.theory.occupancy import expert_occupancy, occupancy, source
from openrlhf_bd.theory.operators import (
    inverse_soft_backup,
    optimal_soft_backup,
    policy_value,
    soft_backup,
    soft_policy,
    soft_value,
    top_p_optimal_soft_backup,
    top_p_soft_backup,
)
from openrlhf_bd.theory.random_mdps import random_mdps, random_prefix_tree
from openrlhf_bd.theory.sets import mask, project, set_mass, supported_norm, top_p_sets
from openrlhf_bd.theory.solve import evaluate_policy, iterate, solve_optimal

INF = np.inf


def chain(gamma: float = 0.5) -> TabularMDP:
    """State 0: action 0 leads to state 1, action 1 ends. State 1: both actions end. Rewards log 1, 2, 3, 5."""
    transition_SAS = np.zeros((2, 2, 2))
    transition_SAS[0, 0, 1] = 1.0
    reward_SA = np.log([[1.0, 2.0], [3.0, 5.0]])
    return TabularMDP(transition_SAS, reward_SA, gamma, np.array([1.0, 0.0]), np.ones((2, 2), dtype=bool))


def test_soft_values():
    """V^Q is log sum exp, pi_Q its softmax, and V^pi = E[Q - log pi]; -inf stands for what is not available."""
    q_SA = np.array([[np.log(1.0), np.log(3.0)], [np.log(2.0), -INF]])
    np.testing.assert_allclose(soft_value(q_SA), np.log([4.0, 2.0]))
    np.testing.assert_allclose(soft_policy(q_SA), [[0.25, 0.75], [1.0, 0.0]])
    # Uniform in state 0: (log 1 + log 3) / 2 + log 2. Certain in state 1: log 2.
    uniform_SA = np.array([[0.5, 0.5], [1.0, 0.0]])
    np.testing.assert_allclose(policy_value(q_SA, uniform_SA), [np.log(3) / 2 + np.log(2), np.log(2)])
    # At pi_Q the two agree (below Eq. 17).
    np.testing.assert_allclose(policy_value(q_SA, soft_policy(q_SA)), soft_value(q_SA))


def test_soft_values_of_large_q():
    """Neither value nor policy overflows at 1,000 nats."""
    q_SA = np.array([[1000.0, 1000.0], [-1000.0, -INF]])
    np.testing.assert_allclose(soft_value(q_SA), [1000 + np.log(2), -1000.0])
    np.testing.assert_allclose(soft_policy(q_SA), [[0.5, 0.5], [1.0, 0.0]])


def test_backups():
    """Eq. 6 and 9, and their optimality versions, on the chain at gamma = .5."""
    mdp = chain()
    q_SA = np.log(np.array([[1.0, 1.0], [4.0, 12.0]]))
    rewards = mdp.reward_SA
    # Optimum: V(1) = log 16, so Q(0, 0) = log 1 + .5 log 16 = log 4; what ends has its reward.
    expected = np.array([[np.log(4), rewards[0, 1]], rewards[1]])
    np.testing.assert_allclose(optimal_soft_backup(mdp, q_SA), expected)
    # Uniform policy: V(1) = (log 4 + log 12) / 2 + log 2 = log(2 sqrt 48).
    uniform_SA = np.full((2, 2), 0.5)
    expected[0, 0] = 0.5 * np.log(2 * np.sqrt(48))
    np.testing.assert_allclose(soft_backup(mdp, q_SA, uniform_SA), expected)
    # On the sets {0, 1} and {1}: V(1) = log 12 for either, since the projection is certain.
    sets_SA = np.array([[True, True], [False, True]])
    expected = np.array([[0.5 * np.log(12), rewards[0, 1]], [-INF, rewards[1, 1]]])
    np.testing.assert_allclose(top_p_soft_backup(mdp, q_SA, uniform_SA, sets_SA), expected)
    np.testing.assert_allclose(top_p_optimal_soft_backup(mdp, q_SA, sets_SA), expected)


def test_implied_reward():
    """T Q = Q - gamma V(s'): the reward of the optimality operator's fixed point."""
    mdp = chain()
    np.testing.assert_allclose(inverse_soft_backup(mdp, solve_optimal(mdp).q_SA), mdp.reward_SA, atol=1e-12)


def test_fixed_points():
    """Q* of the chain: V(1) = log 8, Q(0, 0) = .5 log 8, V(0) = log(2 + sqrt 8); pi* = exp(Q* - V*)."""
    found = solve_optimal(chain())
    np.testing.assert_allclose(found.value_S, np.log([2 + np.sqrt(8), 8]))
    np.testing.assert_allclose(found.q_SA[0], [0.5 * np.log(8), np.log(2)])
    np.testing.assert_allclose(found.policy_SA[1], [3 / 8, 5 / 8])
    assert found.residual <= 1e-11
    # The uniform policy: V(1) = log sqrt 15 + log 2, V(0) = (.5 V(1) + log 2) / 2 + log 2.
    uniform = evaluate_policy(chain(), np.full((2, 2), 0.5))
    value_1 = np.log(2 * np.sqrt(15))
    np.testing.assert_allclose(uniform.value_S, [(0.5 * value_1 + np.log(2)) / 2 + np.log(2), value_1])


def test_iteration_that_does_not_arrive_says_so():
    """An iteration that is stopped early raises with the residual that it had; so does policy iteration."""
    mdp = next(random_mdps(1, seed=1, gamma=0.99))
    with pytest.raises(ArithmeticError, match=r"residual .* after 3 iterations, expected 1e-11"):
        iterate(lambda q_SA: optimal_soft_backup(mdp, q_SA), np.zeros((6, 5)), max_iterations=3)
    with pytest.raises(ArithmeticError, match="after 1 policies"):
        solve_optimal(mdp, max_iterations=1)
    with pytest.raises(ArithmeticError, match="gradient inf after 0 steps"):
        imitation_optimum(mdp, np.ones((6, 5)), alpha=1.0, max_iterations=0)


def test_top_p_sets():
    """Inclusive: mass strictly before < p. Exclusive: mass up to it <= p, at least one. Ties by lower index."""
    policy_SA = np.array([[0.5, 0.25, 0.125, 0.125], [0.125, 0.125, 0.125, 0.625]])
    inclusive = [[True, True, False, False], [False, False, False, True]]
    np.testing.assert_array_equal(top_p_sets(policy_SA, 0.625), inclusive)
    exclusive = [[True, False, False, False], [False, False, False, True]]
    np.testing.assert_array_equal(top_p_sets(policy_SA, 0.625, inclusive=False), exclusive)
    # At .75 state 0 has exactly p with two; state 1 needs one more, and of three equals the first.
    np.testing.assert_array_equal(top_p_sets(policy_SA, 0.75), [[True, True, False, False], [True, False, False, True]])
    assert top_p_sets(policy_SA, 0.1, inclusive=False).sum() == 2
    assert top_p_sets(policy_SA, 1.0).all()
    with pytest.raises(ValueError, match=r"top_p is 0; it must be in \(0, 1\]"):
        top_p_sets(policy_SA, 0)


def test_projection_mask_and_norm():
    """Eq. 8, 15 and 11."""
    policy_SA = np.array([[0.5, 0.25, 0.25]])
    sets_SA = np.array([[True, True, False]])
    np.testing.assert_allclose(set_mass(policy_SA, sets_SA), [0.75])
    np.testing.assert_allclose(project(policy_SA, sets_SA), [[2 / 3, 1 / 3, 0.0]])
    np.testing.assert_array_equal(mask(np.array([[1.0, 2.0, 3.0]]), sets_SA), [[1.0, 2.0, -INF]])
    assert supported_norm(np.array([[1.0, -2.0, 30.0]]), sets_SA) == 2.0


def test_kappa():
    """kappa(.8) at gamma .99 is 99 * .22314 = 22.09 nats; 0 at gamma 0 and at p 1."""
    assert kappa(0.8, 0.99) == pytest.approx(22.0912, abs=1e-4)
    assert kappa(0.8, 0.0) == 0.0
    assert kappa(1.0, 0.9) == 0.0


def test_costs_of_the_chain():
    """Sets {0} and {1}: projected and restricted are one policy, and -log P(0) - gamma log P(1) is what it costs."""
    mdp = chain()
    teacher_SA = np.array([[0.75, 0.25], [0.375, 0.625]])
    sets_SA = np.array([[True, False], [False, True]])
    expected = [-np.log(0.75) - 0.5 * np.log(0.625), -np.log(0.625)]
    np.testing.assert_allclose(projection_cost(mdp, teacher_SA, sets_SA), expected)
    np.testing.assert_allclose(restriction_cost(mdp, teacher_SA, sets_SA), expected, atol=1e-12)
    np.testing.assert_allclose(policy_cost(mdp, teacher_SA, sets_SA.astype(float)), expected)
    np.testing.assert_allclose(lower_bound(mdp, teacher_SA, sets_SA), [[-0.5 * np.log(0.625), 0], [0, 0]])


def test_restriction_chooses_the_cheaper_way():
    """g(0) = -log(.6 exp(-.5 (-log .625)) + .4): the optimum on the sets leans away from where much is missing."""
    teacher_SA = np.array([[0.6, 0.4], [0.375, 0.625]])
    sets_SA = np.array([[True, True], [False, True]])
    expected = -np.log(0.6 * np.sqrt(0.625) + 0.4)
    assert restriction_cost(chain(), teacher_SA, sets_SA)[0] == pytest.approx(expected)
    # The projected teacher takes that way 6 times in 10, and pays .6 * .5 * (-log .625).
    assert projection_cost(chain(), teacher_SA, sets_SA)[0] == pytest.approx(-0.3 * np.log(0.625))


def test_occupancy():
    """Visits of the chain: 1 in state 0, gamma times .6 in state 1; the source of that is the start."""
    policy_SA = np.array([[0.6, 0.4], [0.5, 0.5]])
    rho_SA = occupancy(chain(), policy_SA, np.array([1.0, 0.0]))
    np.testing.assert_allclose(rho_SA, [[0.6, 0.4], [0.15, 0.15]])
    np.testing.assert_allclose(source(chain(), rho_SA), [1.0, 0.0], atol=1e-15)
    np.testing.assert_allclose(expert_occupancy(chain(), policy_SA), 0.5 * rho_SA)
    np.testing.assert_allclose(expert_occupancy(chain(1.0), policy_SA), [[0.6, 0.4], [0.3, 0.3]])


def test_imitation_objective():
    """One state, two actions that end, Q = (log 1, log 3), w = (.5, .5), alpha = 1: V = log 4, r = Q.

    J = .5 (0 - log 4) + .5 (log 3 - log 4) - .5 (log 3)^2 / 4
    """
    mdp = TabularMDP(np.zeros((1, 2, 1)), np.zeros((1, 2)), 0.9, np.ones(1), np.ones((1, 2), dtype=bool))
    q_SA, weight_SA = np.log([[1.0, 3.0]]), np.full((1, 2), 0.5)
    expected = 0.5 * np.log(3) - np.log(4) - np.log(3) ** 2 / 8
    assert imitation_objective(mdp, q_SA, weight_SA, alpha=1.0) == pytest.approx(expected)
    # Without the regulariser the weights' own policy is the best; by symmetry it is so with one.
    np.testing.assert_allclose(imitation_optimum(mdp, weight_SA, alpha=0.1).policy_SA, weight_SA)
    # Dual of (.25, .75) against (.5, .5): chi^2 = .25, entropy of the learner.
    dual = chi_squared_dual(mdp, np.array([[0.25, 0.75]]), weight_SA, alpha=2.0)
    assert dual == pytest.approx(0.5 + 0.25 * np.log(0.25) + 0.75 * np.log(0.75))


def test_measured_gaps_of_a_loop():
    """One state that stays for ever, pi* = (.5, .3, .2), p = .8, gamma = .9: the gap is kappa(.8), and .5 breaks it."""
    teacher_SA = np.array([[0.5, 0.3, 0.2]])
    loop = TabularMDP(np.ones((1, 3, 1)), np.log(teacher_SA), 0.9, np.ones(1), np.ones((1, 3), dtype=bool))
    gaps = measure_gaps(loop, solve_optimal(loop), 0.75)  # the set is two actions, mass .8
    assert not gaps.ends
    assert gaps.kappa_p == pytest.approx(-9 * np.log(0.75))
    for measured in (gaps.kappa_mass, gaps.projected_gap, gaps.optimal_gap):
        assert measured == pytest.approx(-9 * np.log(0.8))
    assert gaps.lower_bound == pytest.approx(-0.9 * np.log(0.8))
    assert gaps.value_gap == pytest.approx(-10 * np.log(0.8))
    assert gaps.exclusive_gap == pytest.approx(-9 * np.log(0.5))
    assert gaps.violations == 0


def test_violations_are_counted(monkeypatch):
    """A bound that is wrong is seen: with half of kappa, Prop. 2, its finer form and Prop. 4 fail."""
    teacher_SA = np.array([[0.5, 0.3, 0.2]])
    loop = TabularMDP(np.ones((1, 3, 1)), np.log(teacher_SA), 0.9, np.ones(1), np.ones((1, 3), dtype=bool))
    monkeypatch.setattr("openrlhf_bd.theory.gaps.kappa", lambda mass, gamma: 0.5 * kappa(mass, gamma))
    assert measure_gaps(loop, solve_optimal(loop), 0.75).violations == 3


def test_mdp_is_checked():
    """Shapes, probabilities, empty sets and an endless MDP at gamma 1 are refused with what was found."""
    mdp = chain()
    on_SA = np.ones((2, 2), dtype=bool)
    with pytest.raises(ValueError, match="have shapes"):
        TabularMDP(mdp.transition_SAS, mdp.reward_SA[:1], 0.5, mdp.start_S, on_SA)
    with pytest.raises(ValueError, match=r"rows sum to 1\.5 at most"):
        TabularMDP(1.5 * mdp.transition_SAS, mdp.reward_SA, 0.5, mdp.start_S, on_SA)
    with pytest.raises(ValueError, match="state 1 has no action"):
        top_p_mdp(mdp, np.array([[True, False], [False, False]]))
    with pytest.raises(ValueError, match=r"gamma is 1\.5"):
        chain(1.5)
    with pytest.raises(ValueError, match="some policy never ends"):
        TabularMDP(np.ones((1, 1, 1)), np.zeros((1, 1)), 1.0, np.ones(1), on_SA[:1, :1])


@pytest.mark.parametrize("terminating", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_random_mdps_are_of_the_kind_asked_for(terminating, deterministic):
    """Generated MDPs end always or never, and move for certain or by luck; number i does not depend on the count."""
    kind = {"terminating": terminating, "deterministic": deterministic}
    many = list(random_mdps(20, seed=3, gamma=0.9, **kind))
    for mdp in many:
        total_SA = mdp.transition_SAS.sum(axis=2)
        assert always_ends(mdp) == terminating
        assert (total_SA.min() > 1 - 1e-12) == (not terminating)
        assert np.isin(mdp.transition_SAS, (0.0, 1.0)).all() == deterministic
        assert mdp.start_S.sum() == pytest.approx(1.0)
    few = list(random_mdps(3, seed=3, gamma=0.5, **kind))
    np.testing.assert_array_equal(few[2].transition_SAS, many[2].transition_SAS)
    np.testing.assert_array_equal(few[2].reward_SA, many[2].reward_SA)


def test_prefix_tree():
    """Three tokens, depth 3: 1 + 2 + 4 prefixes; token 0 ends, others concatenate, everything ends at the longest."""
    tree = random_prefix_tree(np.random.default_rng(0), num_tokens=3, depth=3, gamma=1.0)
    assert tree.prefixes == ((), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2))
    assert tree.mdp.transition_SAS.sum() == 6
    assert tree.mdp.transition_SAS[0, 2, 2] == 1
    assert tree.mdp.transition_SAS[2, 1, 5] == 1
    assert tree.mdp.transition_SAS[3:].sum() == 0
    assert always_ends(tree.mdp)


def test_theory_needs_numpy_alone():
    """Importing the theory loads neither torch nor the libraries of the processes."""
    code = (
        "import sys, openrlhf_bd.theory.gaps, openrlhf_bd.theory.imitation, openrlhf_bd.theory.random_mdps\n"
        "print(sorted({'torch', 'ray', 'vllm', 'deepspeed', 'pydantic', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
