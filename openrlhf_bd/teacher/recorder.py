"""The worker extension that records candidate sets inside vLLM, while text is generated or scored.

Two places of a model runner are wrapped. The *sampler* sees the raw logits of every step (before temperature,
penalties and nucleus): that gives the states of a response as it is sampled. The *prompt pass* has the hidden states of
every prompt position: that gives the states of a response that is part of the prompt. Both runners of vLLM are
supported: V1 (CPU, and GPUs where it is chosen) and V2 (the default on GPUs); they differ in where a batch keeps its
requests and positions, and in nothing else here.

A request takes part by what its SamplingParams.extra_args carry, since vLLM makes its request ids itself.

Shapes: N states of one step or chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.teacher.states import RecordedRows, StateRecorder

ROW = "openrlhf_bd.row"
SCORE_FROM = "openrlhf_bd.score_from"
SCORE_TAKEN = "openrlhf_bd.score_taken"

# Logits of a chunk of scored prompts: 64 MiB in float32. Two chunks are held at once.
SCORE_CHUNK_ELEMENTS = 2**24


def generation_args(row: int) -> dict[str, Any]:
    """extra_args of a request whose sampled tokens are recorded as `row`."""
    return {ROW: row}


def scoring_args(row: int, *, first_state: int, taken: Sequence[int]) -> dict[str, Any]:
    """extra_args of a request whose prompt is scored.

    Args:
        row: name of the request in the recorder.
        first_state: prompt position whose hidden state predicts the first scored token.
        taken: scored token of each state from there on; NO_TOKEN for a state without one.
    """
    return {ROW: row, SCORE_FROM: first_state, SCORE_TAKEN: list(taken)}


class CandidateRecorder:
    """Methods that `worker_extension_cls` adds to each worker, for `collective_rpc`."""

    model_runner: Any
    use_v2_model_runner: bool
    state_recorder: StateRecorder | None

    def start_recording(self, options: RecordOptions) -> None:
        """Wrap this worker's model runner. Once in the life of an engine."""
        from vllm.distributed import get_tensor_model_parallel_rank

        # Every rank of a tensor-parallel engine samples from the same logits: one records.
        recorder = StateRecorder(options) if get_tensor_model_parallel_rank() == 0 else None
        install = _install_v2 if self.use_v2_model_runner else _install_v1
        install(self.model_runner, recorder)
        self.state_recorder = recorder

    def take_recorded(self, rows: Sequence[int], num_states: Sequence[int]) -> RecordedRows | None:
        """The first states recorded for these rows, from the rank that records; None from the others."""
        return None if self.state_recorder is None else self.state_recorder.take(rows, num_states)

    def forget_recorded(self) -> None:
        """Drop what was recorded for requests that failed."""
        if self.state_recorder is not None:
            self.state_recorder.forget()


@dataclass(frozen=True, slots=True)
class _PromptSpan:
    """Prompt positions of one request that a step computes.

    Attributes:
        args: extra_args of the request.
        start: first position.
        length: positions.
        offset: of the first one in the step's hidden states.
    """

    args: Mapping[str, Any]
    start: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class _SampledState:
    """A state of a step's batch that is to be recorded.

    Attributes:
        logits_row: its row of the logits.
        at: request and position. The position follows from the length of the sequence, which the scheduler knows before
            the tokens are: with async scheduling it is a step ahead of them.
        keeps_logits: whether the sampler leaves the raw logits of this row as they are.
    """

    logits_row: int
    at: tuple[int, int]
    keeps_logits: bool


class _RecordingSampler:
    """Stands where the runner's sampler stood; records what it samples, and is that sampler in everything else.

    Args:
        sampler: of the runner.
        recorder: of this worker.
        sampled_states: the batch's states that are to be recorded, from the second argument of the sampler's call.
    """

    def __init__(
        self, sampler: Any, recorder: StateRecorder, sampled_states: Callable[[Any], list[_SampledState]]
    ) -> None:
        self._sampler = sampler
        self._recorder = recorder
        self._sampled_states = sampled_states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, logits: Tensor, *batch: Any, **named_batch: Any) -> Any:
        states = self._sampled_states(*batch, **named_batch)
        if not states:
            return self._sampler(logits, *batch, **named_batch)
        rows = [state.logits_row for state in states]
        is_whole = rows == list(range(len(logits)))
        rows_N = torch.tensor(rows, device=logits.device)
        if is_whole and all(state.keeps_logits for state in states):
            raw_logits_NV = logits
        else:
            raw_logits_NV = logits.clone() if is_whole else logits[rows_N]
        output = self._sampler(logits, *batch, **named_batch)
        self._recorder.record(raw_logits_NV, [state.at for state in states], output.sampled_token_ids[rows_N, 0])
        return output


def _install_v1(runner: Any, recorder: StateRecorder | None) -> None:
    def sampled_states(sampling_metadata: Any) -> list[_SampledState]:
        states = []
        num_known = runner.optimistic_seq_lens_cpu.tolist()
        # This sampler divides float32 logits by the temperature in place, and cuts all rows where one is cut.
        is_cut = sampling_metadata.top_p is not None or sampling_metadata.top_k is not None
        for row, request_id in enumerate(runner.input_batch.req_ids):
            request = runner.requests[request_id]
            params = request.sampling_params
            args = params.extra_args or {}
            # A prompt that is computed in several steps gives up the samples of all but the last.
            if ROW in args and SCORE_FROM not in args and not runner.discard_request_mask.np[row]:
                at = (args[ROW], num_known[row] - request.num_prompt_tokens)
                states.append(_SampledState(row, at, keeps_logits=params.temperature in (0, 1) and not is_cut))
        return states

    def prompt_spans(num_scheduled_tokens: Mapping[str, int]) -> Iterator[_PromptSpan]:
        for request_id, length in num_scheduled_tokens.items():
            request = runner.requests[request_id]
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
            yield _PromptSpan(request.sampling_params.extra_args or {}, request.num_computed_tokens, length, offset)

    prompt_pass = runner._get_prompt_logprobs_dict

    def recording_prompt_pass(hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int]) -> Any:
        spans = prompt_spans(num_scheduled_tokens)
        _score_prompts(hidden_states, spans, runner.model.compute_logits, _chunk_rows(runner), recorder)
        return prompt_pass(hidden_states, num_scheduled_tokens)

    runner._get_prompt_logprobs_dict = recording_prompt_pass
    if recorder is not None:
        runner.sampler = _RecordingSampler(runner.sampler, recorder, sampled_states)


def _install_v2(runner: Any, recorder: StateRecorder | None) -> None:
    # V2 keeps requests in slots, and their parameters nowhere in one piece: remember what each slot was given.
    slots: dict[int, tuple[Mapping[str, Any], int]] = {}
    add_request = runner.sampler.add_request

    def remembering_add_request(slot: int, prompt_len: int, sampling_params: Any) -> None:
        slots[slot] = (sampling_params.extra_args or {}, prompt_len)
        add_request(slot, prompt_len, sampling_params)

    def sampled_states(batch: Any) -> list[_SampledState]:
        states = []
        for row, slot in enumerate(batch.idx_mapping_np.tolist()):
            args, prompt_len = slots[slot]
            num_known = batch.num_computed_tokens_np[row] + batch.num_scheduled_tokens[row]
            if ROW in args and SCORE_FROM not in args and num_known >= batch.prefill_len_np[row]:
                # This sampler works on a copy.
                states.append(_SampledState(row, (args[ROW], int(num_known) - prompt_len), keeps_logits=True))
        return states

    def prompt_spans(batch: Any) -> Iterator[_PromptSpan]:
        for row, slot in enumerate(batch.idx_mapping_np.tolist()):
            start, length = int(batch.num_computed_tokens_np[row]), int(batch.num_scheduled_tokens[row])
            yield _PromptSpan(slots[slot][0], start, length, int(batch.query_start_loc_np[row]))

    prompt_pass = runner.prompt_logprobs_worker.compute_prompt_logprobs

    def recording_prompt_pass(
        logits_fn: Callable[[Tensor], Tensor], hidden_states: Tensor, batch: Any, *rest: Any
    ) -> Any:
        _score_prompts(hidden_states, prompt_spans(batch), logits_fn, _chunk_rows(runner), recorder)
        return prompt_pass(logits_fn, hidden_states, batch, *rest)

    runner.prompt_logprobs_worker.compute_prompt_logprobs = recording_prompt_pass
    runner.sampler.add_request = remembering_add_request
    if recorder is not None:
        runner.sampler = _RecordingSampler(runner.sampler, recorder, sampled_states)


def _chunk_rows(runner: Any) -> int:
    return max(1, SCORE_CHUNK_ELEMENTS // runner.vllm_config.model_config.get_vocab_size())


def _score_prompts(
    hidden_states_NH: Tensor,
    spans: Iterable[_PromptSpan],
    compute_logits: Callable[[Tensor], Tensor],
    chunk_rows: int,
    recorder: StateRecorder | None,
) -> None:
    """Record the scored states among the prompt positions that this step has computed.

    Every rank of a tensor-parallel engine computes its part of the logits; the one with a recorder keeps them.
    """
    rows: list[int] = []
    at: list[tuple[int, int]] = []
    taken: list[int] = []
    for span in spans:
        if SCORE_FROM not in span.args:
            continue
        first, scored = span.args[SCORE_FROM], span.args[SCORE_TAKEN]
        for position in range(max(span.start, first), min(span.start + span.length, first + len(scored))):
            rows.append(span.offset + position - span.start)
            at.append((span.args[ROW], position - first))
            taken.append(scored[position - first])
    for start in range(0, len(rows), chunk_rows):
        chunk = slice(start, start + chunk_rows)
        logits_NV = compute_logits(hidden_states_NH[torch.tensor(rows[chunk], device=hidden_states_NH.device)])
        if recorder is not None:
            recorder.record(logits_NV, at[chunk], torch.tensor(taken[chunk], device=logits_NV.device))
