"""A teacher behind a server: the rollouts of `TeacherEngine`, with sets of what the server tells, K tokens a state.

Shapes: T response tokens, S states with a set, K tokens reported of a state, R rollouts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.endpoint import ApiOptions
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.engines.loop import Progress
from openrlhf_bd.engines.spans import SpanLog
from openrlhf_bd.errors import DataError
from openrlhf_bd.records import Activity, Rollout, Span
from openrlhf_bd.teacher.api import ApiCompletion, TeacherApi
from openrlhf_bd.teacher.engine import hash_of, with_states
from openrlhf_bd.teacher.requests import RolloutRequest
from openrlhf_bd.teacher.states import NO_TOKEN
from openrlhf_bd.teacher.top_logprobs import TopLogprobs, record_top

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """A teacher behind a server, and what is recorded of it.

    Attributes:
        api: the server.
        model: name of the model there.
        max_model_len: longest prompt and response together there, tokens.
        top_logprobs: K.
        concurrency: requests on the way at once.
        stop_token_ids: ids that end a response.
        record: what is recorded of the states.
    """

    api: ApiOptions
    model: str
    max_model_len: int
    top_logprobs: int
    concurrency: int
    stop_token_ids: tuple[int, ...]
    record: RecordOptions


class RemoteTeacher:
    """A client of the server, with the methods of `TeacherEngine`: an actor hosts it, or any process.

    Args:
        options: of the teacher.
    """

    def __init__(self, options: RemoteOptions) -> None:
        started = self._answered = time.monotonic()
        self._options = options
        self._num_answers = self._num_tokens = 0
        self._spans = SpanLog()
        self._api = TeacherApi(options.api)
        # Sets of p = 1, and no sets, need the taken tokens alone.
        self._num_top = 0 if options.record.top_p in (None, 1) else options.top_logprobs
        self._start_s = time.monotonic() - started

    def ready(self) -> dict[str, Any]:
        """What works here. Answers once the server does.

        Raises:
            ClusterError: it does not answer.
        """
        import openai
        import psutil

        served = [model.id for model in self._api.models()]
        return {
            "model": self._options.model,
            "served": served,
            "max_model_len": self._options.max_model_len,
            "stop_token_ids": list(self._options.stop_token_ids),
            "versions": {"openai": openai.__version__},
            "start_s": self._start_s,
            "rss_bytes": psutil.Process().memory_info().rss,
        }

    def progress(self) -> Progress:
        """A sign of life of the client, at once: answers are its steps.

        None of its requests counts as running here: how long the server may take for one is `ApiOptions`'s to say.
        """
        return Progress(
            num_steps=self._num_answers,
            num_tokens=self._num_tokens,
            num_running=0,
            num_waiting=0,
            since_step_s=time.monotonic() - self._answered,
            version=None,
            is_paused=False,
        )

    def generate_rollouts(
        self, requests: Sequence[RolloutRequest], *, temperature: float, top_p: float
    ) -> list[Rollout]:
        """Sample one response to each request; see `TeacherEngine.generate_rollouts`.

        Raises:
            ClusterError: the server does not answer, whatever was tried.
            DataError: it refuses a request, or answers otherwise than was asked for.
        """

        def sample(request: RolloutRequest) -> Rollout:
            prompt_ids, asked = request.seen_by_teacher, request.max_new_tokens
            # The set of the state after a cut response comes with one token more, which is dropped.
            asked += self._spare(len(prompt_ids) + asked)
            answer = self._complete(
                prompt_ids,
                what=f"row {request.row_id}",
                max_tokens=asked,
                temperature=temperature,
                top_p=top_p,
                seed=request.seed,
            )
            self._check_end(answer, request.row_id, asked)
            response_ids = np.array(answer.token_ids[: request.max_new_tokens], dtype=np.int32)
            stopped = int(response_ids[-1]) in self._options.stop_token_ids
            rollout = Rollout(
                row_id=request.row_id,
                prompt_ids=request.prompt_ids,
                response_ids=response_ids,
                finish_reason="stop" if stopped else "length",
                teacher_prompt_hash=hash_of(request.teacher_ids),
                teacher=request.teacher,
            )
            return self._recorded(rollout, answer.token_ids, answer.top_T)

        return self._all(sample, requests, "generate")

    def score(
        self, rollouts: Sequence[Rollout], teacher_prompts: Sequence[NDArray[np.int32] | None] | None = None
    ) -> list[Rollout]:
        """The teacher's log-probabilities and sets on given responses; see `TeacherEngine.score`.

        A response cut where the server's model is full cannot be scored: the server samples one token after it.

        Raises:
            ClusterError: the server does not answer, whatever was tried.
            DataError: prompt and response together leave no room for one token more, or one of them is empty.
        """
        seen = list(teacher_prompts) if teacher_prompts is not None else [None] * len(rollouts)

        def score_one(row: tuple[Rollout, NDArray[np.int32] | None]) -> Rollout:
            rollout, teacher_ids = row
            prompt_ids = rollout.prompt_ids if teacher_ids is None else teacher_ids
            num_prompt, num_response = len(prompt_ids), len(rollout.response_ids)
            if not num_prompt or not num_response or not self._spare(num_prompt + num_response):
                raise DataError(
                    f"row {rollout.row_id}: found {num_prompt} prompt and {num_response} response tokens, expected at "
                    f"least one of each to score, and less than {self._options.max_model_len} in all (max_model_len of "
                    "the server)"
                )
            answer = self._complete(
                np.concatenate([prompt_ids, rollout.response_ids]),
                what=f"row {rollout.row_id}",
                max_tokens=1,
                temperature=0.0,
                top_p=1.0,
                prompt_logprobs=self._num_top,
            )
            taken, top_S = rollout.response_ids.tolist(), answer.prompt_top[num_prompt - 1 :]
            if rollout.finish_reason == "length":
                # The sampled token is the likeliest, so the K tokens have it; its own log-probability is of no use.
                taken, top_S = [*taken, NO_TOKEN], [*top_S, answer.top_T[0]]
            return self._recorded(replace(rollout, teacher_prompt_hash=hash_of(teacher_ids)), taken, top_S)

        return self._all(score_one, list(zip(rollouts, seen, strict=True)), "score")

    def take_spans(self, *, everything: bool = False) -> tuple[float, list[Span]]:
        """When requests were on their way since the last call, and this machine's clock; see `SpanLog.take`."""
        return self._spans.take(everything=everything)

    def _complete(self, prompt_ids: NDArray[np.int32], **request: Any) -> ApiCompletion:
        answer = self._api.complete(
            prompt_ids,
            model=self._options.model,
            top_logprobs=self._num_top,
            stop_token_ids=self._options.stop_token_ids,
            **request,
        )
        # Only for `progress`: an answer that two threads count as one does no harm.
        self._num_answers += 1
        self._num_tokens += len(answer.token_ids)
        self._answered = time.monotonic()
        return answer

    def _recorded(self, rollout: Rollout, taken: Sequence[int], top_S: Sequence[TopLogprobs]) -> Rollout:
        states = record_top(taken, top_S, self._options.record, max_candidates=self._options.top_logprobs)
        return with_states(rollout, states)

    def _spare(self, num_tokens: int) -> int:
        """1 if the server's model leaves a position after so many tokens, else 0."""
        return int(num_tokens < self._options.max_model_len)

    def _check_end(self, answer: ApiCompletion, row_id: str, asked: int) -> None:
        """Refuse a response that ended by another rule than ours."""
        last, num_tokens = answer.token_ids[-1], len(answer.token_ids)
        if answer.stopped and last not in self._options.stop_token_ids:
            raise DataError(
                f"row {row_id}: the server ended the response by token {last}, expected one of "
                f"{list(self._options.stop_token_ids)}, the student's stop tokens. Make the eos_token_id in "
                "generation_config.json of teacher and student (--actor.model_name_or_path) equal"
            )
        if not answer.stopped and num_tokens != asked:
            raise DataError(
                f"row {row_id}: the server cut the response at {num_tokens} tokens, expected the {asked} asked for; "
                "start it without a limit of its own (vLLM: --generation-config vllm)"
            )

    def _all(self, work: Callable[[Item], Result], items: Sequence[Item], activity: Activity) -> list[Result]:
        """`work` on each item, `concurrency` at once. The first error ends it; what is on the way is not waited for."""
        pool = ThreadPoolExecutor(min(self._options.concurrency, max(len(items), 1)))
        try:
            with self._spans.span(activity):
                return list(pool.map(work, items))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
