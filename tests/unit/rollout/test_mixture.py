"""Teacher-mixed sampling: who samples which token."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.engines.actor import Completion
from openrlhf_bd.rollout.mixture import mixed_runs, mixture_logprobs, sample_mixture
from openrlhf_bd.teacher.requests import RolloutRequest

STUDENT, TEACHER, STOP = 7, 8, 9


def request(seed: int, length: int) -> RolloutRequest:
    prompt, seen = np.array([1, 2], np.int32), np.array([3], np.int32)
    return RolloutRequest(f"q{seed}:0", prompt, seed, length, teacher_ids=seen)


def test_coins_have_the_teachers_share_and_follow_from_the_seed() -> None:
    """Runs cover the whole response, alternate, come again for the same seed, and give the teacher its share."""
    for seed in range(5):
        runs = mixed_runs(request(seed, 50), 0.3)
        assert sum(length for _, length in runs) == 50
        assert all(first[0] != second[0] for first, second in itertools.pairwise(runs))
        assert runs == mixed_runs(request(seed, 50), 0.3)
    tokens = sum(length for seed in range(400) for teacher, length in mixed_runs(request(seed, 50), 0.3) if teacher)
    # sqrt(.3 * .7 / 20000) = .0032
    assert abs(tokens / 20_000 - 0.3) < 5 * 0.0032


def test_each_model_continues_what_is_there_under_its_own_prompt() -> None:
    """The teacher's tokens stand where its coins are; a stop ends a row; the first version of the student stays."""
    seen: list[list[int]] = []

    def complete(token: int, prompts: list[NDArray[np.int32]], lengths: list[int]) -> list[Completion]:
        seen.extend(prompt.tolist() for prompt in prompts)
        version = None if token == TEACHER else 4 + len(seen)
        return [Completion(np.full(n, token, np.int32), "length", first_version=version) for n in lengths]

    def student(prompts: list[NDArray[np.int32]], lengths: list[int], seeds: list[int]) -> list[Completion]:
        assert all(0 <= seed < 2**63 for seed in seeds)
        return complete(STUDENT, prompts, lengths)

    def teacher(
        prompts: list[NDArray[np.int32]], lengths: list[int], seeds: list[int]
    ) -> Callable[[], list[Completion]]:
        return lambda: complete(TEACHER, prompts, lengths)

    [row] = sample_mixture([request(3, 12)], teacher_share=0.4, student=student, teacher=teacher)
    runs = mixed_runs(request(3, 12), 0.4)
    expected = [TEACHER if by_teacher else STUDENT for by_teacher, length in runs for _ in range(length)]
    assert row.token_ids == expected
    assert not row.has_stopped
    starts = np.cumsum([0, *(length for _, length in runs)])
    for prompt, (by_teacher, _), start in zip(seen, runs, starts.tolist(), strict=False):
        assert prompt == ([3] if by_teacher else [1, 2]) + expected[:start]
    # The call number of the student's first run, after 4: it is the first or the second call.
    assert row.version == (5 if not runs[0][0] else 6)


def test_a_stop_token_ends_the_row() -> None:
    """A run that ends with a stop token is the last one, shorter or not."""

    def student(prompts: list[NDArray[np.int32]], lengths: list[int], seeds: list[int]) -> list[Completion]:
        return [Completion(np.array([STUDENT, STOP], np.int32), "stop", first_version=0) for _ in prompts]

    def teacher(
        prompts: list[NDArray[np.int32]], lengths: list[int], seeds: list[int]
    ) -> Callable[[], list[Completion]]:
        return lambda: [Completion(np.array([STOP], np.int32), "stop") for _ in prompts]

    rows = sample_mixture([request(seed, 30) for seed in range(8)], teacher_share=0.5, student=student, teacher=teacher)
    assert all(row.has_stopped for row in rows)
    assert {tuple(row.token_ids) for row in rows} == {(STUDENT, STOP), (STOP,)}


def test_tokens_keep_the_log_probability_that_they_were_sampled_with() -> None:
    """The student's tokens have that of the weights of their run, the teacher's that of the score at the end."""
    calls = itertools.count(1)

    def student(prompts: list[NDArray[np.int32]], lengths: list[int], seeds: list[int]) -> list[Completion]:
        version = next(calls)
        return [
            Completion(np.full(n, STUDENT, np.int32), "length", np.full(n, -version, np.float32), version)
            for n in lengths
        ]

    def teacher(
        prompts: list[NDArray[np.int32]], lengths: list[int], seeds: list[int]
    ) -> Callable[[], list[Completion]]:
        return lambda: [Completion(np.full(n, TEACHER, np.int32), "length") for n in lengths]

    [row] = sample_mixture([request(3, 12)], teacher_share=0.4, student=student, teacher=teacher)
    expected, version = [], 0
    for by_teacher, length in mixed_runs(request(3, 12), 0.4):
        version += not by_teacher
        expected += [-50.0 if by_teacher else -float(version)] * length
    assert version > 1
    assert row.student_logprobs(np.full(12, -50.0, np.float32)).tolist() == expected


def test_log_probability_of_the_mixture() -> None:
    """.2 * .5 + .8 * .25 = .3 and .2 * 1 + .8 * 0 = .2."""
    with np.errstate(divide="ignore"):
        found = mixture_logprobs(np.log(np.float32([0.5, 1.0])), np.log(np.float32([0.25, 0.0])), 0.2)
    np.testing.assert_allclose(np.exp(found), [0.3, 0.2], rtol=1e-6)
