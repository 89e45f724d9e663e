"""Recorded states of requests: what was drawn from raw logits, kept by request and position until it is fetched.

Shapes: N states of one step or chunk, S states of one request or of a whole fetch, M candidates, R requests,
V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.functional.candidates import top_p_candidates
from openrlhf_bd.records import RecordedSets

NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class RecordedStates:
    """States in a row: of one step of the engine, or of one request.

    Attributes:
        taken_S: token taken at each state; NO_TOKEN where there is none.
        taken_logprob_S: its log-probability at temperature 1, nats; 0 where there is none.
        sets: candidate sets of the S states, or None if only log-probabilities are recorded.
    """

    taken_S: NDArray[np.int32]
    taken_logprob_S: NDArray[np.float32]
    sets: RecordedSets | None


@dataclass(frozen=True, slots=True)
class RecordedRows:
    """R requests, their states one after another in flat arrays: the form that crosses from a worker.

    Attributes:
        num_states_R: states of each request.
        states: of all requests.
    """

    num_states_R: NDArray[np.int64]
    states: RecordedStates

    def rows(self) -> Iterator[RecordedStates]:
        """The requests one by one, as views of the flat arrays."""
        bounds = np.concatenate([[0], np.cumsum(self.num_states_R)]).tolist()
        for start, stop in itertools.pairwise(bounds):
            yield RecordedStates(
                self.states.taken_S[start:stop],
                self.states.taken_logprob_S[start:stop],
                None if self.states.sets is None else slice_sets(self.states.sets, start, stop),
            )


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was handed in: its raw logits, and when a GPU will have them."""

    logits_NV: Tensor
    at: Sequence[tuple[int, int]]
    taken_N: Tensor
    ready: torch.cuda.Event | None


class StateRecorder:
    """Keeps states by request and position. A position that is recorded again replaces the earlier one.

    A step is worked on when the next one is handed in. By then a GPU has its logits and is busy with the next forward
    pass, so that reading them, on a stream of their own, keeps neither it nor the scheduler waiting.

    Args:
        options: what to record.
    """

    def __init__(self, options: RecordOptions) -> None:
        self.options = options
        # The arrays stay in steps, as they came; a state is a step and an index in it.
        self._states: dict[int, dict[int, tuple[RecordedStates, int]]] = {}
        self._waiting: _Step | None = None
        self._stream: torch.cuda.Stream | None = None

    def record(self, logits_NV: Tensor, at: Sequence[tuple[int, int]], taken_N: Tensor) -> None:
        """Record N states.

        Args:
            logits_NV: raw logits, of any floating type; they must stay as they are until the next call.
            at: request and position of each state.
            taken_N: token taken at each, NO_TOKEN for none.
        """
        self._work_off()
        ready = torch.cuda.current_stream(logits_NV.device).record_event() if logits_NV.is_cuda else None
        self._waiting = _Step(logits_NV, at, taken_N, ready)

    def take(self, requests: Sequence[int], num_states: Sequence[int]) -> RecordedRows:
        """The states of these requests by position, which are then forgotten.

        Args:
            requests: R requests.
            num_states: states of each. There may be one more: an engine that schedules a step ahead of its tokens
                samples once after a stop token, and drops what it sampled.

        Raises:
            RuntimeError: a state is missing.
        """
        self._work_off()
        rows = [self._take_row(request, count) for request, count in zip(requests, num_states, strict=True)]
        return RecordedRows(
            num_states_R=np.array(num_states, dtype=np.int64),
            states=gather_states([state for row in rows for state in row], with_sets=self.options.top_p is not None),
        )

    def forget(self) -> None:
        """Drop everything."""
        self._waiting = None
        self._states.clear()

    def _work_off(self) -> None:
        step, self._waiting = self._waiting, None
        if step is None:
            return
        with self._beside_the_engine(step):
            # The arrays are in host memory once this returns, so the logits may go.
            states = record_states(step.logits_NV, step.taken_N, self.options)
        for index, (request, position) in enumerate(step.at):
            self._states.setdefault(request, {})[position] = (states, index)

    @contextmanager
    def _beside_the_engine(self, step: _Step) -> Iterator[None]:
        if step.ready is None:
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(step.logits_NV.device)
        self._stream.wait_event(step.ready)
        with torch.cuda.stream(self._stream):
            yield

    def _take_row(self, request: int, num_states: int) -> list[tuple[RecordedStates, int]]:
        by_position = self._states.pop(request, {})
        missing = [position for position in range(num_states) if position not in by_position]
        if missing:
            raise RuntimeError(
                f"recorded states of request {request}: found {len(by_position)} positions without {missing[:8]}, "
                f"expected all of {num_states}; the recorder does not fit this version of vLLM"
            )
        return [by_position[position] for position in range(num_states)]


def record_states(logits_NV: Tensor, taken_N: Tensor, options: RecordOptions) -> RecordedStates:
    """Sets and the taken tokens' log-probabilities at temperature 1, as NumPy arrays.

    Args:
        logits_NV: raw logits, of any floating type; computed with in float32.
        taken_N: token taken at each state, NO_TOKEN for none.
        options: what to record.
    """
    logits_NV = logits_NV.float()
    taken_N = taken_N.long()
    if options.top_p is None or options.top_p == 1:
        sets = None if options.top_p is None else RecordedSets.whole(len(taken_N))
        taken_logit_N = logits_NV.gather(-1, taken_N.clamp_min(0)[:, None])[:, 0]
        taken_logprob_N = (taken_logit_N - logits_NV.logsumexp(-1)).cpu()
    else:
        candidates = top_p_candidates(
            logits_NV, top_p=options.top_p, always_include=options.always_include, device="cpu"
        )
        assert candidates.logprobs_M is not None
        # The most likely token gives the normaliser without another pass over the vocabulary.
        first_N = candidates.offsets_S1[:-1]
        first_id_N = candidates.ids_M[first_N].to(logits_NV.device)
        both_N2 = logits_NV.gather(-1, torch.stack([taken_N.clamp_min(0), first_id_N], dim=1)).cpu()
        taken_logprob_N = both_N2[:, 0] - (both_N2[:, 1] - candidates.logprobs_M[first_N])
        sets = RecordedSets(
            ids_M=_numpy(candidates.ids_M, torch.int32),
            offsets=_numpy(candidates.offsets_S1, torch.int64),
            neg_log_mass_S=_numpy(candidates.neg_log_mass_S, torch.float32),
            logprobs_M=_numpy(candidates.logprobs_M, torch.float32) if options.logprobs else None,
        )
    taken_N = taken_N.cpu()
    taken_logprob_N = torch.where(taken_N == NO_TOKEN, 0.0, taken_logprob_N)
    return RecordedStates(_numpy(taken_N, torch.int32), _numpy(taken_logprob_N, torch.float32), sets)


def gather_states(states: Sequence[tuple[RecordedStates, int]], *, with_sets: bool) -> RecordedStates:
    """States picked from several steps, in the order given."""
    return RecordedStates(
        taken_S=np.array([step.taken_S[i] for step, i in states], dtype=np.int32),
        taken_logprob_S=np.array([step.taken_logprob_S[i] for step, i in states], dtype=np.float32),
        sets=_gather_sets([(step.sets, i) for step, i in states if step.sets is not None]) if with_sets else None,
    )


def slice_sets(sets: RecordedSets, start: int, stop: int) -> RecordedSets:
    """Sets of the states start to stop, as views."""
    first, last = sets.offsets[start], sets.offsets[stop]
    return RecordedSets(
        ids_M=sets.ids_M[first:last],
        offsets=sets.offsets[start : stop + 1] - first,
        neg_log_mass_S=sets.neg_log_mass_S[start:stop],
        logprobs_M=None if sets.logprobs_M is None else sets.logprobs_M[first:last],
    )


def _gather_sets(states: Sequence[tuple[RecordedSets, int]]) -> RecordedSets:
    spans = [slice(sets.offsets[i], sets.offsets[i + 1]) for sets, i in states]
    logprobs = [
        sets.logprobs_M[span] for (sets, _), span in zip(states, spans, strict=True) if sets.logprobs_M is not None
    ]
    return RecordedSets(
        ids_M=np.concatenate([sets.ids_M[span] for (sets, _), span in zip(states, spans, strict=True)]),
        offsets=np.concatenate([[0], np.cumsum([span.stop - span.start for span in spans])]).astype(np.int64),
        neg_log_mass_S=np.array([sets.neg_log_mass_S[i] for sets, i in states], dtype=np.float32),
        logprobs_M=np.concatenate(logprobs) if logprobs else None,
    )


def _numpy(tensor: Tensor, dtype: torch.dtype) -> NDArray:
    return tensor.to("cpu", dtype).numpy()
