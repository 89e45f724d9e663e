"""Exposure of a student: its distance from the teacher along its own responses, and along the teacher's.

A model process holds both (`ExposureModels`); this module sends it responses and puts the measures together.
"""

# T tokens of one response

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.config import Config
from openrlhf_bd.evaluation.results import Exposure
from openrlhf_bd.evaluation.sampling import Request, make_requests, run_batches, sample_responses
from openrlhf_bd.functional.exposure import ErrorCurve, excess_error
from openrlhf_bd.records import Prompt

if TYPE_CHECKING:
    from openrlhf_bd.engines.actor import Completion

# Responses that the models look at between two signs of progress.
BATCH_SIZE = 64

Answers = Sequence[Sequence["Completion"]]


@dataclass(frozen=True, slots=True)
class ResponseRow:
    """A response as both models see it.

    Attributes:
        prompt_ids: the student's prompt.
        teacher_prompt_ids: the teacher's.
        response_ids: at least one token.
    """

    prompt_ids: NDArray[np.int32]
    teacher_prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class RowMeasures:
    """Measures at every token of a response; see `functional.exposure.StateMeasures`."""

    forward_kl_T: NDArray[np.floating]
    reverse_kl_T: NDArray[np.floating]
    teacher_nll_T: NDArray[np.floating]
    outside_T: NDArray[np.bool_]


def exposure_of(
    student: Sequence[Sequence[RowMeasures]], teacher: Sequence[Sequence[RowMeasures]], *, top_p: float
) -> Exposure:
    """Put measures of responses together: means over the tokens of each seed, curves over all of them.

    Args:
        student: of the student's responses, those of one seed after the other.
        teacher: of the teacher's responses to the same prompts.
        top_p: p of the sets that they were measured with.
    """
    curves = [ErrorCurve.of([row.forward_kl_T for rows in group for row in rows]) for group in (student, teacher)]
    length = min(len(curve.mean_T) for curve in curves)
    own, others = (curve.head(length) for curve in curves)
    return Exposure(
        top_p=top_p,
        forward_kl=[_mean([row.forward_kl_T for row in rows]) for rows in student],
        reverse_kl=[_mean([row.reverse_kl_T for row in rows]) for rows in student],
        teacher_nll=[_mean([row.teacher_nll_T for row in rows]) for rows in student],
        out_of_set_rate=[_mean([row.outside_T for row in rows]) for rows in student],
        positions=list(range(1, length + 1)),
        forward_kl_student_T=own.mean_T.tolist(),
        forward_kl_teacher_T=others.mean_T.tolist(),
        reach_student_T=own.reach_T.tolist(),
        reach_teacher_T=others.reach_T.tolist(),
        excess_error_T=excess_error(own, others).tolist(),
    )


def _mean(values: Sequence[NDArray[Any]]) -> float:
    """Mean over all tokens: long responses weigh more."""
    return float(np.concatenate(values).mean(dtype=np.float64))


def teacher_answers(
    engines: Sequence[Any],
    tests: Mapping[str, Sequence[Prompt]],
    config: Config,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, list[list[Completion]]]:
    """The teacher's own responses to each test set, those of one seed after the other, at temperature 1.

    Each is as long as both the teacher's prompt and the student's allow.

    Args:
        engines: actor handles of `GenerationEngine` that host the teacher.
        tests: prompts by test set.
        config: `eval.seeds`, `eval.max_new_tokens`, `data.max_len`, `cluster.generate_timeout_s`.
        on_progress: called with the number of responses just sampled.

    Raises:
        DataError: a prompt leaves no room for a response.
        ClusterError: an engine died or did not answer in time.
    """
    requests_of = partial(make_requests, max_new_tokens=config.eval.max_new_tokens, max_len=config.data.max_len)
    seeds = config.eval.seeds
    requests: list[Request] = []
    for prompts in tests.values():
        seen = [Prompt(prompt.prompt_id, prompt.seen_by_teacher, {}) for prompt in prompts]
        for seed in seeds:
            pairs = zip(requests_of(seen, seed=seed), requests_of(prompts, seed=seed), strict=True)
            requests += [
                Request(own.prompt_ids, min(own.max_new_tokens, other.max_new_tokens), own.seed) for own, other in pairs
            ]
    completions = iter(
        sample_responses(
            engines,
            requests,
            temperature=1.0,
            top_p=1.0,
            timeout_s=config.cluster.generate_timeout_s,
            on_progress=on_progress,
        )
    )
    return {name: [[next(completions) for _ in prompts] for _ in seeds] for name, prompts in tests.items()}


class ExposureMeter:
    """Measures the model that `models` holds as the student.

    Args:
        models: actor handle of `ExposureModels`.
        teacher: the teacher's responses, of `teacher_answers`.
        config: `eval.exposure_top_p`, `cluster.generate_timeout_s`.
    """

    def __init__(self, models: Any, teacher: Mapping[str, Answers], config: Config) -> None:
        self._models, self._teacher, self._config = models, teacher, config

    def measure(
        self,
        test_set: str,
        prompts: Sequence[Prompt],
        completions: Answers,
        on_progress: Callable[[int], None] | None,
    ) -> Exposure:
        """See `evaluation.evaluate.Meter`.

        Raises:
            ClusterError: the models died or did not answer in time.
        """
        own = self._measured(prompts, completions, on_progress)
        others = self._measured(prompts, self._teacher[test_set], on_progress)
        return exposure_of(own, others, top_p=self._config.eval.exposure_top_p)

    def _measured(
        self, prompts: Sequence[Prompt], answers: Answers, on_progress: Callable[[int], None] | None
    ) -> list[list[RowMeasures]]:
        rows = [
            ResponseRow(prompt.token_ids, prompt.seen_by_teacher, completion.token_ids)
            for of_seed in answers
            for prompt, completion in zip(prompts, of_seed, strict=True)
        ]
        found = run_batches(
            [self._models],
            rows,
            lambda models, batch: models.measure.remote(batch),
            timeout_s=self._config.cluster.generate_timeout_s,
            what="measures of exposure",
            on_progress=on_progress,
            batch_size=BATCH_SIZE,
        )
        return [found[start : start + len(prompts)] for start in range(0, len(found), len(prompts))]
