"""The teacher's engine: rollouts with candidate sets, sampled anew or scored on given tokens.

Shapes: T response tokens, S states with a set, R rollouts.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.engines.actor import GenerationEngine
from openrlhf_bd.errors import DataError
from openrlhf_bd.records import Activity, Rollout
from openrlhf_bd.store.shards import prompt_hash
from openrlhf_bd.teacher.recorder import generation_args, scoring_args
from openrlhf_bd.teacher.requests import RolloutRequest
from openrlhf_bd.teacher.states import NO_TOKEN, RecordedStates

if TYPE_CHECKING:
    from vllm import LLM


class TeacherEngine(GenerationEngine):
    """One engine that records what `RecordOptions` in its arguments ask for.

    Args:
        arguments: of `engine_arguments`, with `record`.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._rows = itertools.count()
        # One call at a time: the next one forgets what a failed one had recorded.
        self._recording = threading.Lock()
        super().__init__(arguments)

    def generate_rollouts(
        self, requests: Sequence[RolloutRequest], *, temperature: float, top_p: float
    ) -> list[Rollout]:
        """Sample one response to each request.

        One token more than asked for is sampled where the model's length allows it: the candidate set of the state
        after a cut response is recorded with it, and the token itself dropped.

        Args:
            requests: R requests.
            temperature: of the sampler; sets and log-probabilities are at temperature 1 all the same.
            top_p: nucleus of the sampler; it does not change what is recorded.

        Returns:
            R rollouts with log-probabilities, and with sets if the engine records them. They have the student's
            prompts, and a hash of the teacher's where that is another.

        Raises:
            DataError: a prompt is empty, or leaves less room than its max_new_tokens.
        """
        rows = [next(self._rows) for _ in requests]
        params = [
            self._sampling_params(
                max_tokens=request.max_new_tokens + self._spare(len(request.seen_by_teacher) + request.max_new_tokens),
                temperature=temperature,
                top_p=top_p,
                seed=request.seed,
                extra_args=generation_args(row),
            )
            for row, request in zip(rows, requests, strict=True)
        ]
        outputs, recorded = self._run_recorded([request.seen_by_teacher for request in requests], params, rows)
        return [
            self._rollout(request, output.outputs[0].token_ids, states)
            for request, output, states in zip(requests, outputs, recorded, strict=True)
        ]

    def score(
        self, rollouts: Sequence[Rollout], teacher_prompts: Sequence[NDArray[np.int32] | None] | None = None
    ) -> list[Rollout]:
        """The teacher's log-probabilities and sets on given responses, from one pass over the tokens.

        Args:
            rollouts: R rollouts, of any origin.
            teacher_prompts: for each the prompt under which the teacher sees the response; None: the rollout's own.

        Returns:
            R rollouts of the same tokens with logprobs_T, and with sets if the engine records them: T of them, or T + 1
            for a response cut at a length that leaves the model one more position. The prompts stay the rollouts' own.

        Raises:
            DataError: prompt and response together are longer than the engine takes, or one of them is empty.
        """
        rows = [next(self._rows) for _ in rollouts]
        prompts, params, num_states = [], [], []
        seen = list(teacher_prompts) if teacher_prompts is not None else [None] * len(rollouts)
        for row, rollout, teacher_ids in zip(rows, rollouts, seen, strict=True):
            prompt_ids = rollout.prompt_ids if teacher_ids is None else teacher_ids
            num_prompt, num_response = len(prompt_ids), len(rollout.response_ids)
            if not num_prompt or not num_response:
                raise DataError(
                    f"row {rollout.row_id}: found {num_prompt} prompt and {num_response} response tokens, expected at "
                    "least one of each to score"
                )
            # The last token's own state is only of use to a cut response.
            spare = self._spare(num_prompt + num_response) if rollout.finish_reason == "length" else 0
            tokens = np.concatenate([prompt_ids, rollout.response_ids])
            prompts.append(tokens if spare else tokens[:-1])
            taken = [*rollout.response_ids.tolist(), *([NO_TOKEN] * spare)]
            num_states.append(len(taken))
            params.append(
                self._sampling_params(
                    max_tokens=1,
                    temperature=0.0,
                    # A cached prefix has no hidden states to score.
                    skip_reading_prefix_cache=True,
                    extra_args=scoring_args(row, first_state=num_prompt - 1, taken=taken),
                )
            )
        _, recorded = self._run_recorded(prompts, params, rows, num_states, activity="score")
        return [
            with_states(replace(rollout, teacher_prompt_hash=hash_of(teacher_ids)), states)
            for rollout, teacher_ids, states in zip(rollouts, seen, recorded, strict=True)
        ]

    def _build(self) -> LLM:
        llm = super()._build()
        llm.collective_rpc("start_recording", args=(self.arguments["record"],))
        return llm

    def _spare(self, num_tokens: int) -> int:
        """1 if the engine's length leaves a position after so many tokens, else 0."""
        return int(num_tokens < self.arguments["llm"]["max_model_len"])

    def _run_recorded(
        self,
        prompts: Sequence[NDArray[np.int32]],
        params: Sequence[Any],
        rows: Sequence[int],
        num_states: Sequence[int] | None = None,
        *,
        activity: Activity = "generate",
    ) -> tuple[list[Any], list[RecordedStates]]:
        """Outputs and recorded states of requests; without num_states one state for each sampled token."""
        with self._recording:
            # What a call that failed left behind. Not at its own end: workers that died would fail once more, and hide
            # the error that tells why.
            self._rpc("forget_recorded")
            outputs = [sampled.output for sampled in self._run(prompts, params, activity)]
            if num_states is None:
                num_states = [len(output.outputs[0].token_ids) for output in outputs]
            fetched = self._rpc("take_recorded", rows, num_states)
        return outputs, list(fetched[0].rows())

    def _rollout(self, request: RolloutRequest, token_ids: Sequence[int], states: RecordedStates) -> Rollout:
        """One rollout; the token after a cut response is dropped, its set stays."""
        sampled = np.asarray(token_ids, dtype=np.int32)
        if not np.array_equal(sampled, states.taken_S):
            raise RuntimeError(
                f"row {request.row_id}: found {len(states.taken_S)} recorded states for {len(sampled)} sampled tokens, "
                "or other tokens in them, expected the same; the recorder does not fit this version of vLLM"
            )
        completion = self._completion(token_ids[: request.max_new_tokens])
        rollout = Rollout(
            row_id=request.row_id,
            prompt_ids=request.prompt_ids,
            response_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            teacher_prompt_hash=hash_of(request.teacher_ids),
            teacher=request.teacher,
        )
        return with_states(rollout, states)


def hash_of(teacher_ids: NDArray[np.int32] | None) -> int | None:
    """Hash of the teacher's prompt, where that is not the row's own."""
    return None if teacher_ids is None else prompt_hash(teacher_ids)


def with_states(rollout: Rollout, states: RecordedStates) -> Rollout:
    """A row with what was recorded at its states, one for each response token or one more."""
    return replace(rollout, logprobs_T=states.taken_logprob_S[: len(rollout.response_ids)], sets=states.sets)
