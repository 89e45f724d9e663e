"""The loss that students are trained with is the objective of the theory: a language model small enough to enumerate.

States are prefixes, and every response is a row. Each row's loss counts with the teacher's probability of the response,
so the sum is the expectation that a large sample of rows would approach.
"""

# S prefixes, V tokens, T response tokens

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from openrlhf_bd.config import BellmanOptions
from openrlhf_bd.functional.bellman import bellman_loss_from_logits
from openrlhf_bd.functional.candidates import CandidateSets, top_p_candidates
from openrlhf_bd.functional.trajectories import Behaviour, Trajectories
from openrlhf_bd.theory.imitation import (
    imitation_gradient,
    imitation_objective,
    imitation_optimum,
    occupancy_from_reward,
)
from openrlhf_bd.theory.mdp import TabularMDP, top_p_mdp
from openrlhf_bd.theory.occupancy import expert_occupancy, occupancy, source
from openrlhf_bd.theory.random_mdps import PrefixTree, random_prefix_tree
from openrlhf_bd.theory.sets import project, top_p_sets
from openrlhf_bd.theory.solve import solve_optimal

GAMMA, NUM_TOKENS = 0.9, 3


@dataclass(frozen=True)
class LanguageModel:
    """A teacher over all responses of at most three tokens, its sets, and the learner's side of the theory.

    Attributes:
        tree: the MDP of prefixes.
        teacher_SV: pi*.
        sets_SV: its top-p sets.
        visits_SV: expected number of times that a response takes the token at the prefix, on the sets.
    """

    tree: PrefixTree
    teacher_SV: np.ndarray
    sets_SV: np.ndarray
    visits_SV: np.ndarray

    @property
    def inside(self) -> TabularMDP:
        return top_p_mdp(self.tree.mdp, self.sets_SV)

    def responses(self) -> list[tuple[list[int], list[int], float]]:
        """(states, tokens, probability) of every response."""
        state_of = {prefix: state for state, prefix in enumerate(self.tree.prefixes)}
        found = []
        for prefix in self.tree.prefixes:
            for token in range(NUM_TOKENS):
                response = (*prefix, token)
                if response not in state_of:
                    states = [state_of[response[:t]] for t in range(len(response))]
                    found.append((states, list(response), float(np.prod(self.teacher_SV[states, list(response)]))))
        return found


def language_model(seed: int, top_p: float) -> LanguageModel:
    tree = random_prefix_tree(np.random.default_rng([40, seed]), num_tokens=NUM_TOKENS, depth=3, gamma=GAMMA)
    teacher_SV = solve_optimal(tree.mdp).policy_SA
    sets_SV = top_p_sets(teacher_SV, top_p)
    visits_SV = expert_occupancy(replace(tree.mdp, gamma=1.0), teacher_SV)
    return LanguageModel(tree, teacher_SV, sets_SV, np.where(sets_SV, visits_SV, 0.0))


@dataclass(frozen=True)
class Row:
    """A response as the loss takes it, with its probability."""

    states: list[int]
    probability: float
    sets: CandidateSets
    trajectory: Trajectories


def rows_of(model: LanguageModel, top_p: float) -> list[Row]:
    """Every response, with the sets that the product makes of the teacher's logits, masses in float64."""
    rows = []
    for states, tokens, probability in model.responses():
        num_tokens = len(tokens)
        logprobs_TV = torch.from_numpy(np.log(model.teacher_SV[states]))
        sets = top_p_candidates(logprobs_TV, top_p=top_p)
        if top_p < 1:
            logprobs_M = logprobs_TV[sets.state_M, sets.ids_M]
            mass_T = torch.zeros(num_tokens, dtype=torch.float64).index_add(0, sets.state_M, logprobs_M.exp())
            sets = replace(sets, logprobs_M=logprobs_M, neg_log_mass_S=-mass_T.log())
        trajectory = Trajectories(
            taken_S=torch.tensor(tokens),
            next_S=torch.tensor([*range(1, num_tokens), -1]),
            terminal_S=torch.arange(num_tokens) == num_tokens - 1,
            row_S=torch.zeros(num_tokens, dtype=torch.int64),
        )
        rows.append(Row(states, probability, sets, trajectory))
    return rows


def expected_loss(rows: list[Row], logits_SV: torch.Tensor, options: BellmanOptions) -> torch.Tensor:
    """Mean over responses of the sum over tokens of the product's loss; Q is the logits themselves (shift 0)."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        terms = bellman_loss_from_logits(
            logits_SV[row.states],
            row.sets,
            row.trajectory,
            options,
            num_tokens=1.0,
            num_rows=1.0,
            shift_constant=0.0,
        )
        total = total + row.probability * terms.loss
    return total


def options_for(top_p: float, alpha: float, **changes) -> BellmanOptions:
    values = {"q_shift": "constant", "linear_term": "sampled", "terminal": "zero", "tail_coef": 0.0, "q_min": None}
    return BellmanOptions(top_p=top_p, alpha=alpha, gamma=GAMMA, include_eos=False, **(values | changes))


def masked(model: LanguageModel, table_SV: np.ndarray) -> np.ndarray:
    return np.where(model.sets_SV, table_SV, -np.inf)


@pytest.mark.parametrize(
    ("linear_term", "top_p", "alpha"),
    [
        ("sampled", 1.0, 0.1),
        ("sampled", 0.8, 0.1),
        ("sampled", 0.8, 5.0),
        ("sampled", 0.5, 1.0),
        ("expected", 0.8, 0.1),
        ("expected", 0.5, 1.0),
    ],
)
def test_loss_is_the_tabular_objective(linear_term, top_p, alpha):
    """Over enumerated responses the loss is -J(Q) of Eq. 17 with token visits as weights, and so is its gradient."""
    for seed in range(5):
        model = language_model(seed, top_p)
        assert sum(probability for _, _, probability in model.responses()) == pytest.approx(1.0)
        q_SV = np.random.default_rng(seed).normal(size=model.teacher_SV.shape)
        logits_SV = torch.from_numpy(q_SV).requires_grad_()
        loss = expected_loss(rows_of(model, top_p), logits_SV, options_for(top_p, alpha, linear_term=linear_term))
        loss.backward()
        arguments = (model.inside, masked(model, q_SV), model.visits_SV)
        assert loss.item() == pytest.approx(-imitation_objective(*arguments, alpha=alpha), rel=1e-11)
        gradient_SV = imitation_gradient(*arguments, alpha=alpha)
        np.testing.assert_allclose(logits_SV.grad.numpy(), -gradient_SV, atol=1e-12)


@pytest.mark.parametrize(("top_p", "beta"), [(1.0, 0.5), (0.8, 0.3), (0.5, 0.7)])
def test_loss_of_both_sources_is_the_objective_of_their_mixture(top_p, beta):
    """The share beta of the student's own responses adds beta rho_S to the weights of chi-squared, and nothing else."""
    alpha, options = 0.7, options_for(top_p, 0.7, student_target="none")
    for seed in range(5):
        model, rng = language_model(seed, top_p), np.random.default_rng([43, seed])
        student_SV = rng.dirichlet(np.ones(NUM_TOKENS), size=len(model.teacher_SV))
        sampled = replace(model, teacher_SV=student_SV)
        rows = [replace(row, probability=(1 - beta) * row.probability) for row in rows_of(model, top_p)]
        for row, (_, _, probability) in zip(rows_of(model, top_p), sampled.responses(), strict=True):
            flags, zeros = torch.ones(len(row.states), dtype=torch.bool), torch.zeros(len(row.states))
            trajectory = replace(row.trajectory, behaviour=Behaviour(flags, zeros, zeros))
            rows.append(replace(row, probability=beta * probability, trajectory=trajectory))
        q_SV = rng.normal(size=model.teacher_SV.shape)
        logits_SV = torch.from_numpy(q_SV).requires_grad_()
        loss = expected_loss(rows, logits_SV, options)
        loss.backward()
        visits_SV = expert_occupancy(replace(model.tree.mdp, gamma=1.0), student_SV)
        weight_SV = (1 - beta) * model.visits_SV
        chi_SV = weight_SV + beta * np.where(model.sets_SV, visits_SV, 0.0)
        arguments = (model.inside, masked(model, q_SV), weight_SV)
        objective = imitation_objective(*arguments, alpha=alpha, chi_SA=chi_SV)
        assert loss.item() == pytest.approx(-objective, rel=1e-11)
        gradient_SV = imitation_gradient(*arguments, alpha=alpha, chi_SA=chi_SV)
        np.testing.assert_allclose(logits_SV.grad.numpy(), -gradient_SV, atol=1e-12)


@pytest.mark.parametrize(("top_p", "alpha"), [(1.0, 0.1), (1.0, 5.0), (0.8, 1.0), (0.8, 50.0)])
def test_loss_is_stationary_at_the_tabular_optimum(top_p, alpha):
    """The tabular optimum has no gradient under the loss; there r = 2 alpha (1 - learner's / teacher's occupancy)."""
    for seed in range(5):
        model = language_model(seed, top_p)
        found = imitation_optimum(model.inside, model.visits_SV, alpha=alpha)
        logits_SV = torch.from_numpy(np.where(model.sets_SV, found.q_SA, -3.0)).requires_grad_()
        expected_loss(rows_of(model, top_p), logits_SV, options_for(top_p, alpha)).backward()
        np.testing.assert_allclose(logits_SV.grad.numpy(), 0.0, atol=1e-11)
        learner_SV = occupancy(model.inside, found.policy_SA, source(model.inside, model.visits_SV))
        left_SV = occupancy_from_reward(model.inside, found.q_SA, model.visits_SV, alpha=alpha)
        np.testing.assert_allclose(left_SV, learner_SV, atol=1e-10)


@pytest.mark.parametrize(("top_p", "alpha"), [(1.0, 1.0), (0.8, 20.0)])
def test_training_finds_the_tabular_optimum(top_p, alpha):
    """Minimising the loss from random logits ends at the policy that the theory says."""
    model = language_model(0, top_p)
    found = imitation_optimum(model.inside, model.visits_SV, alpha=alpha)
    logits_SV = torch.from_numpy(np.random.default_rng(41).normal(size=model.teacher_SV.shape)).requires_grad_()
    policy_SV = trained_policy(model, logits_SV, options_for(top_p, alpha))
    np.testing.assert_allclose(policy_SV, found.policy_SA, atol=1e-6)


def test_training_with_large_alpha_projects_the_teacher():
    """alpha -> infinity: training ends at proj pi*, for any shift of Q."""
    model = language_model(1, 0.8)
    for q_shift in ("constant", "max", "logsumexp"):
        logits_SV = torch.from_numpy(np.random.default_rng(42).normal(size=model.teacher_SV.shape)).requires_grad_()
        policy_SV = trained_policy(model, logits_SV, options_for(0.8, 1e7, q_shift=q_shift))
        np.testing.assert_allclose(policy_SV, project(model.teacher_SV, model.sets_SV), atol=1e-5)


@pytest.mark.parametrize(("out_of_set", "stationary"), [("drop", True), ("clip", False), ("zero", False)])
def test_only_dropped_tokens_leave_the_projected_teacher(out_of_set, stationary):
    """alpha -> infinity: proj pi* is stationary where sampled tokens outside their set are dropped, and only there.

    Otherwise a state's gradients sum to d(s) (1 - P(s)), the share of its tokens outside: every value is pushed down.
    """
    model = language_model(3, 0.8)
    log_teacher_SV = np.log(project(model.teacher_SV, model.sets_SV).clip(min=1e-300))
    logits_SV = torch.from_numpy(np.where(model.sets_SV, log_teacher_SV, -30.0)).requires_grad_()
    options = options_for(0.8, 1e12, out_of_set=out_of_set, q_min=-40.0)
    expected_loss(rows_of(model, 0.8), logits_SV, options).backward()
    visits_SV = expert_occupancy(replace(model.tree.mdp, gamma=1.0), model.teacher_SV)
    outside_S = np.where(model.sets_SV, 0.0, visits_SV).sum(axis=1)
    expected_S = np.zeros_like(outside_S) if stationary else outside_S
    assert outside_S.max() > 0.01
    np.testing.assert_allclose(logits_SV.grad.numpy().sum(axis=1), expected_S, atol=1e-9)
    assert (logits_SV.grad.abs().max().item() < 1e-9) == stationary


def test_shifts_that_depend_on_the_state_move_the_optimum():
    """At a finite alpha such a shift takes away Q's level in each state, and with it the tabular optimum."""
    model = language_model(2, 1.0)
    found = imitation_optimum(model.inside, model.visits_SV, alpha=1.0)
    for q_shift in ("max", "topp_max", "logsumexp"):
        logits_SV = torch.from_numpy(found.q_SA).requires_grad_()
        expected_loss(rows_of(model, 1.0), logits_SV, options_for(1.0, 1.0, q_shift=q_shift)).backward()
        assert logits_SV.grad.abs().max() > 1e-2


def trained_policy(model: LanguageModel, logits_SV: torch.Tensor, options: BellmanOptions) -> np.ndarray:
    rows = rows_of(model, options.top_p)
    optimizer = torch.optim.LBFGS(
        [logits_SV], max_iter=100, tolerance_grad=1e-8, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(rows, logits_SV, options)
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.softmax(torch.from_numpy(masked(model, logits_SV.detach().numpy())), dim=1).numpy()
