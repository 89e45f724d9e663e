"""The student's engine as it makes rows: responses with the policy that sampled each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from openrlhf_bd.engines.actor import Completion
from openrlhf_bd.engines.rollout import RolloutEngine
from openrlhf_bd.records import FinishReason, Origin, Rollout
from openrlhf_bd.rollout.mixture import sample_mixture
from openrlhf_bd.teacher.requests import RolloutRequest


class StudentSampler(RolloutEngine):
    """A rollout engine that gives rows of the store, without the teacher's part."""

    def sample(
        self, requests: Sequence[RolloutRequest], *, steps: Sequence[int], temperature: float, top_p: float
    ) -> tuple[list[Rollout], list[int]]:
        """Sample one response to each request.

        Args:
            requests: R requests; the student sees its own prompt.
            steps: optimizer step that each row is for.
            temperature: of the sampler.
            top_p: nucleus of the sampler.

        Returns:
            R rollouts with their origin, and the policy version under which each began.

        Raises:
            DataError: a prompt is empty, or leaves less room than its max_new_tokens.
            ClusterError: an update of the weights failed.
        """
        completions = self.generate(
            [request.prompt_ids for request in requests],
            max_new_tokens=[request.max_new_tokens for request in requests],
            temperature=temperature,
            top_p=top_p,
            seeds=[request.seed for request in requests],
        )
        return _with_versions(
            [
                _rollout(request, c.token_ids, c.finish_reason, step, c.first_version, c.logprobs_T)
                for request, step, c in zip(requests, steps, completions, strict=True)
            ]
        )

    def sample_mixed(
        self, requests: Sequence[RolloutRequest], *, steps: Sequence[int], teacher: Any, teacher_share: float
    ) -> tuple[list[Rollout], list[int]]:
        """Sample one response to each request from the mixture of student and teacher, at temperature 1.

        Args:
            requests: R requests.
            steps: optimizer step that each row is for.
            teacher: actor handle of a teacher's engine.
            teacher_share: of the tokens that it samples.

        Returns:
            As `sample`. The behaviour log-probabilities are the student's alone: those of the mixture also need the
            teacher's, which come when it scores the rows. New weights may come between two runs of tokens: a token of
            the student has the log-probability that it was sampled with, one of the teacher that of the last weights.

        Raises:
            DataError, ClusterError: as `sample`.
        """

        def student(prompts: list[NDArray[np.int32]], lengths: list[int], seeds: list[int]) -> list[Completion]:
            return self.generate(prompts, max_new_tokens=lengths, temperature=1.0, top_p=1.0, seeds=seeds)

        def begin(
            prompts: list[NDArray[np.int32]], lengths: list[int], seeds: list[int]
        ) -> Callable[[], list[Completion]]:
            ref = teacher.generate.remote(prompts, max_new_tokens=lengths, temperature=1.0, top_p=1.0, seeds=seeds)
            return lambda: list(ray.get(ref))

        # A response that is scored needs a position more than it has tokens.
        room = self.arguments["llm"]["max_model_len"] - 1
        requests = [
            replace(request, max_new_tokens=min(request.max_new_tokens, room - len(request.prompt_ids)))
            for request in requests
        ]
        rows = sample_mixture(requests, teacher_share=teacher_share, student=student, teacher=begin)
        responses = [np.array(row.token_ids, np.int32) for row in rows]
        scored = self.score_tokens([request.prompt_ids for request in requests], responses)
        logprobs = [row.student_logprobs(scored_T) for row, scored_T in zip(rows, scored, strict=True)]
        return _with_versions(
            [
                _rollout(row.request, response, "stop" if row.has_stopped else "length", step, row.version, logprobs_T)
                for row, response, step, logprobs_T in zip(rows, responses, steps, logprobs, strict=True)
            ]
        )


def _rollout(
    request: RolloutRequest,
    token_ids: NDArray[np.int32],
    finish_reason: FinishReason,
    step: int,
    version: int | None,
    logprobs_T: NDArray[np.float32] | None,
) -> Rollout:
    # A row without a token by the student is as new as its step.
    origin = Origin(step, "student", step - 1 if version is None else version, logprobs_T)
    return Rollout(request.row_id, request.prompt_ids, token_ids, finish_reason, origin=origin)


def _with_versions(rollouts: list[Rollout]) -> tuple[list[Rollout], list[int]]:
    return rollouts, [int(rollout.origin.policy_version) for rollout in rollouts]  # type: ignore[union-attr, arg-type]
