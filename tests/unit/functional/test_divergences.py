"""Divergences over candidates and a bucket: literals, brute force over the vocabulary, bounds and limits."""

# S states, V vocabulary

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.candidates import CandidateSets, top_p_candidates
from openrlhf_bd.functional.divergences import coarsened_pair, jensen_shannon, projected_pair
from openrlhf_bd.functional.head import DenseHead

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
ROWS = [(4, "stop"), (3, "length"), (1, "stop")]

# One state: student 1/2, 1/8, 1/8, 1/4 (logits as exp 4 1 1 2); teacher .6 and .3 on tokens 0 and 3, .1 elsewhere.
LOGITS = torch.log(torch.tensor([[4.0, 1.0, 1.0, 2.0]], dtype=torch.float64))
SETS = CandidateSets(
    torch.tensor([0, 3]),
    torch.tensor([0, 2]),
    torch.tensor([-math.log(0.9)], dtype=torch.float64),
    torch.log(torch.tensor([0.6, 0.3], dtype=torch.float64)),
)
TEACHER, STUDENT = [0.6, 0.3, 0.1], [0.5, 0.25, 0.25]


def coarse(logits_SV: Tensor, sets: CandidateSets, beta: float) -> Tensor:
    head = DenseHead(logits_SV)
    return jensen_shannon(coarsened_pair(head, head.at_candidates(sets), sets, wanted_by="--x")[0], beta)


def projected(logits_SV: Tensor, sets: CandidateSets, beta: float) -> Tensor:
    z_M = DenseHead(logits_SV).at_candidates(sets)
    return jensen_shannon(projected_pair(z_M, sets, wanted_by="--x"), beta)


def brute_force(teacher: list[float], student: list[float], beta: float) -> float:
    """The definition, one outcome after another."""

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)

    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixture = [beta * p + (1 - beta) * q for p, q in zip(teacher, student, strict=True)]
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def whole(batch: Any, exact: Callable) -> CandidateSets:
    """Sets that list every token."""
    num_tokens = batch.teacher_SV.shape[1]
    return exact(batch.teacher_SV, top_p_candidates(batch.teacher_SV, top_p=0.5, always_include=range(num_tokens)))


def test_known_numbers() -> None:
    """Half of KL(T || M) and KL(S || M) with M = .55 .275 .175, and the KLs at the ends, by hand."""
    half = 0.5 * (0.6 * math.log(0.6 / 0.55) + 0.3 * math.log(0.3 / 0.275) + 0.1 * math.log(0.1 / 0.175))
    half += 0.5 * (0.5 * math.log(0.5 / 0.55) + 0.25 * math.log(0.25 / 0.275) + 0.25 * math.log(0.25 / 0.175))
    forward = 0.6 * math.log(0.6 / 0.5) + 0.3 * math.log(0.3 / 0.25) + 0.1 * math.log(0.1 / 0.25)
    reverse = 0.5 * math.log(0.5 / 0.6) + 0.25 * math.log(0.25 / 0.3) + 0.25 * math.log(0.25 / 0.1)
    for beta, expected in ((0.5, half), (0.0, forward), (1.0, reverse)):
        assert float(coarse(LOGITS, SETS, beta)) == pytest.approx(expected, abs=1e-15)
    # Projected: teacher 2/3 1/3, student 2/3 1/3.
    assert float(projected(LOGITS, SETS, 0.5)) == pytest.approx(0.0, abs=1e-15)
    moved = LOGITS + torch.log(torch.tensor([2.0, 1.0, 1.0, 1.0]).double())  # 4/5 1/5
    expected = 0.8 * math.log(0.8 * 3 / 2) + 0.2 * math.log(0.2 * 3)
    assert float(projected(moved, SETS, 1.0)) == pytest.approx(expected, abs=1e-15)


def test_first_coefficient_is_the_teachers() -> None:
    """TRL's convention at .25: M = .25 T + .75 S, .25 KL(T || M) + .75 KL(S || M)."""
    mixture = [0.25 * p + 0.75 * q for p, q in zip(TEACHER, STUDENT, strict=True)]
    expected = sum(0.25 * p * math.log(p / m) for p, m in zip(TEACHER, mixture, strict=True))
    expected += sum(0.75 * q * math.log(q / m) for q, m in zip(STUDENT, mixture, strict=True))
    assert float(coarse(LOGITS, SETS, 0.25)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("beta", BETAS)
def test_sets_of_the_whole_vocabulary_give_the_divergence_itself(
    make_batch: Callable, exact: Callable, beta: float
) -> None:
    """Value and gradient equal those of a float64 brute force over every token."""
    batch = make_batch(ROWS, seed=70)
    sets = whole(batch, exact)
    z_SV, y_SV = (batch.logits_SV.clone().requires_grad_() for _ in range(2))
    ours = coarse(z_SV, sets, beta)
    log_t, log_s = torch.log_softmax(batch.teacher_SV, dim=1), torch.log_softmax(y_SV, dim=1)
    log_m = torch.log(beta * log_t.exp() + (1 - beta) * log_s.exp())
    kl_t, kl_s = (log_t.exp() * (log_t - log_m)).sum(1), (log_s.exp() * (log_s - log_m)).sum(1)
    theirs = kl_t if beta == 0 else kl_s if beta == 1 else beta * kl_t + (1 - beta) * kl_s
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    upstream = torch.linspace(1, 2, len(ours), dtype=torch.float64)
    ours.backward(upstream)
    theirs.backward(upstream)
    torch.testing.assert_close(z_SV.grad, y_SV.grad, rtol=1e-10, atol=1e-13)
    for s, value in enumerate(ours.tolist()):
        rows = [torch.softmax(x[s], dim=0).tolist() for x in (batch.teacher_SV, batch.logits_SV)]
        assert value == pytest.approx(brute_force(*rows, beta), rel=1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_coarsening_lowers_a_divergence(make_batch: Callable, exact: Callable, beta: float) -> None:
    """At most the divergence over the vocabulary, and the less the fewer tokens a set lists; never below 0."""
    for seed in range(20):
        batch = make_batch(ROWS, seed=seed, vocab_size=9)
        values = [coarse(batch.logits_SV, whole(batch, exact), beta)]
        for top_p in (0.95, 0.8, 0.3):
            sets = exact(batch.teacher_SV, top_p_candidates(batch.teacher_SV, top_p=top_p))
            values.append(coarse(batch.logits_SV, sets, beta))
            teacher_SV, student_SV = (torch.softmax(z, dim=1) for z in (batch.teacher_SV, batch.logits_SV))
            for s in range(len(teacher_SV)):
                ids = sets.ids_M[sets.state_M == s]
                rows = [[*p[s, ids].tolist(), max(0.0, 1 - float(p[s, ids].sum()))] for p in (teacher_SV, student_SV)]
                assert float(values[-1][s]) == pytest.approx(brute_force(*rows, beta), rel=1e-9)
        for larger, smaller in itertools.pairwise(values):
            assert (smaller <= larger + 1e-12).all()
            assert (smaller >= -1e-12).all()


@pytest.mark.parametrize("over", [coarse, projected])
def test_the_ends_are_limits(make_batch: Callable, over: Callable) -> None:
    """JSD_beta / beta -> forward KL and JSD_beta / (1 - beta) -> reverse KL."""
    batch = make_batch(ROWS, seed=71)
    forward, reverse = (over(batch.logits_SV, batch.sets, beta) for beta in (0.0, 1.0))
    torch.testing.assert_close(over(batch.logits_SV, batch.sets, 1e-6) / 1e-6, forward, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(over(batch.logits_SV, batch.sets, 1 - 1e-6) / 1e-6, reverse, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("over", [coarse, projected])
def test_gradients_agree_with_finite_differences(make_batch: Callable, over: Callable, beta: float) -> None:
    """Autograd passes gradcheck."""
    batch = make_batch([(3, "stop"), (2, "length")], seed=72, vocab_size=5)
    z_SV = batch.logits_SV.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: over(z, batch.sets, beta), (z_SV,))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("over", [coarse, projected])
def test_nothing_to_learn_from_the_teacher_itself(make_batch: Callable, over: Callable, beta: float) -> None:
    """A student with the teacher's logits has divergence 0 and no gradient, at any level of its logits."""
    batch = make_batch(ROWS, seed=73)
    z_SV = (batch.teacher_SV + 40).requires_grad_()
    value_S = over(z_SV, batch.sets, beta)
    value_S.sum().backward()
    torch.testing.assert_close(value_S, torch.zeros_like(value_S), rtol=0, atol=1e-12)
    torch.testing.assert_close(z_SV.grad, torch.zeros_like(z_SV), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_impossible_tokens(make_batch: Callable, exact: Callable, beta: float) -> None:
    """-inf outside the sets, of all outside, or of a teacher's token: numbers. At a candidate: +inf forward only."""
    batch = make_batch(ROWS, seed=74, vocab_size=9)
    outside_SV = torch.ones_like(batch.logits_SV, dtype=torch.bool)
    outside_SV[batch.sets.state_M, batch.sets.ids_M] = False
    some_SV = outside_SV & (torch.arange(9) % 2 == 0)
    for mask_SV in (some_SV, outside_SV):
        z_SV = torch.where(mask_SV, -math.inf, batch.logits_SV).requires_grad_()
        value_S = coarse(z_SV, batch.sets, beta)
        value_S.sum().backward()
        assert torch.isfinite(value_S).all()
        assert torch.isfinite(z_SV.grad).all()
    nearly_SV = batch.teacher_SV.clone()
    nearly_SV[:, 4] = -math.inf
    sets = exact(nearly_SV, top_p_candidates(nearly_SV, top_p=0.8, always_include=[4]))
    z_SV = batch.logits_SV.clone().requires_grad_()
    for over in (coarse, projected):
        value_S = over(z_SV, sets, beta)
        value_S.sum().backward()
        assert torch.isfinite(value_S).all()
        assert torch.isfinite(z_SV.grad).all()
    first_M = batch.sets.offsets_S1[:-1]
    z_SV = batch.logits_SV.clone()
    z_SV[torch.arange(len(z_SV)), batch.sets.ids_M[first_M]] = -math.inf
    y_SV = z_SV.requires_grad_()
    value_S = coarse(y_SV, batch.sets, beta)
    assert not value_S.isnan().any()
    assert bool(torch.isfinite(value_S).all()) == (beta > 0)
    if beta > 0:
        value_S.sum().backward()
        assert torch.isfinite(y_SV.grad).all()


def test_rest_that_a_store_rounds_to_nothing() -> None:
    """A mass of 1 in the store, and a student that is not so sure: a finite penalty of 25 log 2 nats for its rest."""
    sets = replace(SETS, neg_log_mass_S=torch.zeros(1, dtype=torch.float64))
    expected = 0.5 * math.log(0.5 * 3 / 2) + 0.25 * math.log(0.25 * 3) + 0.25 * (math.log(0.25) + 25 * math.log(2))
    assert float(coarse(LOGITS, sets, 1.0)) == pytest.approx(expected)


def test_confident_student_in_float32() -> None:
    """60 nats between inside and outside: value and gradient of the bucket are right where 1 - P_theta is 0."""
    sets = CandidateSets(torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([0.01]), torch.tensor([math.log(0.99)]))
    for sign in (1.0, -1.0):
        z_SV = torch.tensor([[60.0 * sign, 0.0]], requires_grad=True)
        y_SV = z_SV.detach().double().requires_grad_()
        for beta in BETAS:
            value, exact = coarse(z_SV, sets, beta), coarse(y_SV, sets, beta)
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-7)
            got, expected = torch.autograd.grad(value, z_SV)[0], torch.autograd.grad(exact, y_SV)[0]
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-7)


def test_float16_sets_are_normalised() -> None:
    """Rounded log-probabilities don't add up to the stored mass: the student that matches them still has 0."""
    rng = np.random.default_rng(75)
    logits_SV = torch.from_numpy(rng.normal(size=(6, 9)) * 3)
    sets = top_p_candidates(logits_SV, top_p=0.9)
    assert sets.logprobs_M is not None
    stored = replace(sets, logprobs_M=sets.logprobs_M.half().float(), neg_log_mass_S=sets.neg_log_mass_S.half().float())
    for beta in BETAS:
        value_S = coarse(logits_SV, stored, beta)
        assert (value_S >= -1e-7).all()
        assert value_S.max() < 1e-4


def test_sets_without_log_probabilities_are_refused() -> None:
    """The message has the option that wanted them."""
    with pytest.raises(ConfigError, match="which --x needs"):
        coarse(LOGITS, replace(SETS, logprobs_M=None), 0.5)
