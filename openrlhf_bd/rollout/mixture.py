"""Teacher-mixed sampling (MiniLLM, Gu et al. 2024): each token from alpha p_T + (1 - alpha) p_S.

A coin for each token says whose distribution it comes from, which is exactly sampling from the mixture. The coins are
thrown in advance, so a run of tokens from the same model is one call of its engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.engines.actor import Completion
from openrlhf_bd.teacher.requests import RolloutRequest

# Samples (prompts, max_new_tokens, seeds) and returns one completion each.
Sampler = Callable[[list[NDArray[np.int32]], list[int], list[int]], list[Completion]]
# Begins to sample, and returns what waits for the completions.
Begin = Callable[[list[NDArray[np.int32]], list[int], list[int]], Callable[[], list[Completion]]]


@dataclass(slots=True)
class MixedRow:
    """A response in the making.

    Attributes:
        request: what is asked for.
        runs: what is left: whether the teacher samples, and how many tokens.
        token_ids: so far.
        logprobs: of these under the student's weights that sampled them, nats; NaN for the teacher's.
        version: of the student's weights of its first token by the student; None before it.
        has_stopped: the last token is a stop token.
    """

    request: RolloutRequest
    runs: list[tuple[bool, int]]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    version: int | None = None
    has_stopped: bool = False

    @property
    def by_teacher(self) -> bool | None:
        """Whose turn it is; None where the response is finished."""
        return self.runs[0][0] if self.runs and not self.has_stopped else None

    def student_logprobs(self, scored_T: NDArray[np.float32]) -> NDArray[np.float32]:
        """The student's log-probability of each token, [T] nats, each from the weights that it was sampled under.

        Args:
            scored_T: of all tokens under one version of the weights; what the teacher's tokens have.
        """
        logprobs_T = np.array(self.logprobs, np.float32)
        return np.where(np.isnan(logprobs_T), scored_T, logprobs_T)


def mixed_runs(request: RolloutRequest, teacher_share: float) -> list[tuple[bool, int]]:
    """Coins of a response, as runs: whether the teacher samples, and for how many tokens. From the row's seed alone."""
    rng = np.random.Generator(np.random.PCG64([request.seed, 1]))
    coins = (rng.random(request.max_new_tokens) < teacher_share).tolist()
    return [(by_teacher, len(list(run))) for by_teacher, run in itertools.groupby(coins)]


def sample_mixture(
    requests: Sequence[RolloutRequest], *, teacher_share: float, student: Sampler, teacher: Begin
) -> list[MixedRow]:
    """Sample one response to each request from the mixture.

    Args:
        requests: R requests; each model sees its own prompt.
        teacher_share: alpha.
        student: samples from the student.
        teacher: begins to sample from the teacher, which works beside the student.

    Returns:
        R finished rows.
    """
    rows = [MixedRow(request, mixed_runs(request, teacher_share)) for request in requests]
    while any(row.by_teacher is not None for row in rows):
        by_teacher = [row for row in rows if row.by_teacher is True]
        by_student = [row for row in rows if row.by_teacher is False]
        finish = teacher(*_calls(by_teacher)) if by_teacher else list
        _extend(by_student, student(*_calls(by_student)) if by_student else [])
        _extend(by_teacher, finish())
    return rows


def mixture_logprobs(
    teacher_logprobs_T: NDArray[np.float32], student_logprobs_T: NDArray[np.float32], teacher_share: float
) -> NDArray[np.float32]:
    """log(alpha p_T + (1 - alpha) p_S) of each token, nats."""
    teacher_T = np.log(teacher_share) + teacher_logprobs_T
    return np.logaddexp(teacher_T, np.log1p(-teacher_share) + student_logprobs_T).astype(np.float32)


def _calls(rows: Sequence[MixedRow]) -> tuple[list[NDArray[np.int32]], list[int], list[int]]:
    prompts, lengths, seeds = [], [], []
    for row in rows:
        by_teacher, length = row.runs[0]
        prompt = row.request.seen_by_teacher if by_teacher else row.request.prompt_ids
        prompts.append(np.concatenate([prompt, np.array(row.token_ids, np.int32)]))
        lengths.append(length)
        [seed] = np.random.SeedSequence([row.request.seed, len(row.token_ids)]).generate_state(1, np.uint64).tolist()
        seeds.append(seed >> 1)
    return prompts, lengths, seeds


def _extend(rows: Sequence[MixedRow], completions: Sequence[Completion]) -> None:
    for row, completion in zip(rows, completions, strict=True):
        by_teacher, _ = row.runs.pop(0)
        row.token_ids += completion.token_ids.tolist()
        own_T = None if by_teacher else completion.logprobs_T
        row.logprobs += np.full(len(completion.token_ids), np.nan).tolist() if own_T is None else own_T.tolist()
        row.has_stopped = completion.finish_reason == "stop"
        if not by_teacher and row.version is None:
            row.version = completion.first_version
