"""Measures of exposure, beside plain ones over an enumerated vocabulary in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from openrlhf_bd.functional.exposure import ErrorCurve, StateMeasures, excess_error, state_measures
from openrlhf_bd.functional.head import DenseHead
from openrlhf_bd.functional.sparse_head import SparseHead

SEEDS = range(8)


def random_heads(seed: int) -> tuple[SparseHead, SparseHead, Tensor, Tensor, Tensor]:
    """Student and teacher with heads of their own over 7 ids, their log-probabilities, and taken tokens."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for width in (3, 5):
        hidden_SH = torch.randn(40, width, generator=random, dtype=torch.float64)
        made.append(SparseHead(hidden_SH, 2 * torch.randn(7, width, generator=random, dtype=torch.float64)))
    student, teacher = made
    logprobs = [torch.log_softmax(head.block(slice(0, 40), slice(0, 7)), dim=1) for head in made]
    taken_S = torch.randint(7, (40,), generator=random)
    return student, teacher, *logprobs, taken_S


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.99, 1.0])
def test_measures_are_sums_over_the_vocabulary(seed: int, top_p: float):
    """Both divergences, the likelihood and the sets are what plain sums over all tokens give, state by state."""
    student, teacher, log_student_SV, log_teacher_SV, taken_S = random_heads(seed)
    found = state_measures(student, teacher, taken_S, top_p=top_p)
    for state, taken in enumerate(taken_S.tolist()):
        p, q = log_teacher_SV[state].exp().tolist(), log_student_SV[state].exp().tolist()
        assert found.forward_kl_S[state].item() == pytest.approx(
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-12
        )
        assert found.reverse_kl_S[state].item() == pytest.approx(
            sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)), abs=1e-12
        )
        assert found.teacher_nll_S[state].item() == pytest.approx(-math.log(p[taken]), abs=1e-12)
        # Inclusive: a token belongs to the set if the mass of all likelier ones is below p.
        likelier = sum(other for other in p if other > p[taken])
        assert found.outside_S[state].item() == (top_p < 1 and likelier >= top_p)


def test_a_student_that_is_its_teacher_is_at_no_distance():
    """Student and teacher alike: both divergences are 0 at every state."""
    _, teacher, _, _, taken_S = random_heads(0)
    found = state_measures(teacher, teacher, taken_S, top_p=0.8)
    assert found.forward_kl_S.abs().max() < 1e-14
    assert found.reverse_kl_S.abs().max() < 1e-14


def test_blocks_of_states_change_nothing(monkeypatch: pytest.MonkeyPatch):
    """Sets are looked up in blocks of states; their size does not matter."""
    student, teacher, _, _, taken_S = random_heads(1)
    whole = state_measures(student, teacher, taken_S, top_p=0.5)
    monkeypatch.setattr("openrlhf_bd.functional.exposure.CHUNK_ELEMENTS", 7 * 3)
    parts = state_measures(student, teacher, taken_S, top_p=0.5)
    assert torch.equal(whole.outside_S, parts.outside_S)
    assert 0 < int(whole.outside_S.sum()) < len(taken_S)


def test_a_token_that_the_teacher_lacks_is_impossible():
    """A token beyond the teacher's ids has probability 0 and lies outside every set; other states are as they were."""
    heads = [DenseHead(torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64))) for _ in range(2)]
    for top_p in (0.8, 1.0):
        found: StateMeasures = state_measures(*heads, torch.tensor([1, 2]), top_p=top_p)
        assert found.teacher_nll_S.tolist() == pytest.approx([math.log(2), math.inf])
        assert found.outside_S.tolist() == [False, True]


def test_curves_by_hand():
    """A curve's mean is over the responses that reach a position; the sum lets the others add nothing."""
    curve = ErrorCurve.of([np.array([1.0, 3.0]), np.array([2.0]), np.array([3.0, 1.0])])
    assert curve.mean_T.tolist() == [2.0, 2.0]
    assert curve.reach_T.tolist() == pytest.approx([1.0, 2 / 3])
    # 2, then 2 + 2/3 * 2
    assert curve.cumulative().tolist() == pytest.approx([2.0, 10 / 3])
    double = ErrorCurve(2 * curve.mean_T, curve.reach_T)
    assert excess_error(double, curve).tolist() == pytest.approx([100.0, 100.0])
    assert excess_error(curve, curve).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="2 and 1 positions"):
        excess_error(curve, curve.head(1))


def test_rounding_is_no_error():
    """Sums below what float32 can tell from 0 count as 0: neither 0/0 nor a ratio of rounding errors comes out."""
    noise = ErrorCurve(np.array([3e-8, 2e-8]), np.ones(2))
    errs = ErrorCurve(np.array([3e-8, 1.0]), np.ones(2))
    assert excess_error(ErrorCurve(np.array([5e-8, 0.0]), np.ones(2)), noise).tolist() == [0.0, 0.0]
    assert excess_error(errs, noise).tolist() == [0.0, math.inf]


# A response is a path of tokens 0 to 4; token 0 ends it. Policies give each prefix a distribution in quarters, so that
# a list with every response as often as its probability says is finite and exact.
Policy = dict[tuple[int, ...], list[float]]
LENGTH = 3


def prefixes() -> Iterator[tuple[int, ...]]:
    for length in range(LENGTH):
        yield from itertools.product(range(1, 5), repeat=length)


def random_policy(seed: int) -> Policy:
    random = np.random.default_rng(seed)
    return {prefix: (random.multinomial(4, np.full(5, 0.2)) / 4).tolist() for prefix in prefixes()}


def every_response(policy: Policy) -> list[tuple[int, ...]]:
    """4 ** LENGTH responses, each as often as its probability says."""
    found: list[tuple[int, ...]] = []

    def extend(prefix: tuple[int, ...], times: int) -> None:
        if times and (len(prefix) == LENGTH or (prefix and prefix[-1] == 0)):
            found.extend([prefix] * times)
        elif times:
            for token, share in enumerate(policy[prefix]):
                extend((*prefix, token), round(times * share))

    extend((), 4**LENGTH)
    return found


def kl(teacher: list[float], student: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(teacher, student, strict=True) if a)


def curve_of(sampler: Policy, teacher: Policy, student: Policy) -> ErrorCurve:
    return ErrorCurve.of(
        [
            np.array([kl(teacher[path[:t]], student[path[:t]]) for t in range(len(path))])
            for path in every_response(sampler)
        ]
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_accumulated_errors_are_those_of_the_enumerated_tree(seed: int):
    """R(l) is the sum over all prefixes of the sampler's probability times the divergence there; along the teacher's
    responses it is the divergence between the distributions over responses cut at l (chain rule)."""
    sampler, teacher = random_policy(seed), random_policy(100 + seed)
    student = {prefix: [0.1 + 0.5 * p for p in random_policy(200 + seed)[prefix]] for prefix in prefixes()}

    def probability(policy: Policy, path: tuple[int, ...]) -> float:
        return math.prod(policy[path[:t]][token] for t, token in enumerate(path))

    own, expected = curve_of(sampler, teacher, student).cumulative(), curve_of(teacher, teacher, student).cumulative()
    for length in range(1, LENGTH + 1):
        shorter = [prefix for prefix in prefixes() if len(prefix) < length]
        total = sum(probability(sampler, prefix) * kl(teacher[prefix], student[prefix]) for prefix in shorter)
        assert own[min(length, len(own)) - 1] == pytest.approx(total, abs=1e-12)
        ended = [(*prefix, 0) for prefix in shorter]
        cut = list(itertools.product(range(1, 5), repeat=length))
        paths = [path for path in [*ended, *cut] if probability(teacher, path) > 0]
        p, q = ([probability(policy, path) for path in paths] for policy in (teacher, student))
        assert expected[min(length, len(expected)) - 1] == pytest.approx(kl(p, q), abs=1e-12)


def test_errors_that_follow_from_errors_are_excess():
    """A student that errs after its own mistakes alone has excess error; one that errs alike everywhere has none."""
    never_ends = [0.0, 0.25, 0.25, 0.25, 0.25]
    teacher: Policy = dict.fromkeys(prefixes(), never_ends)
    teacher[()] = [0.0, 0.5, 0.5, 0.0, 0.0]
    # A quarter of the time the student starts with 3, which the teacher never does, and is lost from there on.
    student: Policy = dict.fromkeys(prefixes(), never_ends)
    student[()] = [0.0, 0.5, 0.25, 0.25, 0.0]
    lost = {prefix: [0.0, 0.25, 0.5, 0.125, 0.125] for prefix in prefixes() if prefix[:1] == (3,)}
    own, expected = curve_of(student, teacher, student | lost), curve_of(teacher, teacher, student | lost)
    # At the first state 1/2 log 1 + 1/2 log 2; where it is lost 1/4 (log 1 + log 1/2 + log 2 + log 2) = 1/4 log 2.
    first, after = 0.5 * math.log(2), 0.25 * math.log(2)
    assert expected.cumulative().tolist() == pytest.approx([first] * 3)
    assert own.cumulative().tolist() == pytest.approx([first, first + 0.25 * after, first + 0.5 * after])
    # 1/4 * 1/4 log 2 over 1/2 log 2 is 1/8, then twice that
    assert excess_error(own, expected).tolist() == pytest.approx([0.0, 12.5, 25.0])
    everywhere: Policy = {prefix: [0.0, 0.25, 0.5, 0.125, 0.125] for prefix in prefixes()}
    uniform: Policy = dict.fromkeys(prefixes(), never_ends)
    alike = excess_error(curve_of(uniform, uniform, everywhere), curve_of(uniform, uniform, everywhere))
    assert alike.tolist() == [0.0, 0.0, 0.0]
