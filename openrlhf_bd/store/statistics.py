"""What is in a store, in numbers: sizes, masses, lengths, and the paper's Figure 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store.cut_sets import count_incomplete
from openrlhf_bd.store.manifest import StoreManifest
from openrlhf_bd.store.reader import StoreReader

# S states, M candidates of one row; K ranks.

QUANTILES = (0.5, 0.9, 0.99, 1.0)
NUM_RANKS = 50
LENGTH_BINS = 40


@dataclass(frozen=True, slots=True)
class SetSummary:
    """Candidate sets of a store.

    Attributes:
        num_states: states with a set.
        num_candidates: ids in all sets.
        mean_size: ids a set.
        size_quantiles: quantile -> size of a set, for QUANTILES.
        size_histogram: (smallest size, largest size, states), in powers of two: 0, 1, 2, 3-4, 5-8, ...
        one_token_share: share of the states whose set is a single token.
        mean_mass: mean of the teacher's mass P on the set.
        incomplete_share: share of the states whose set is incomplete: the K tokens that a server told hold less than p.
            None where sets are exact.
        out_of_set_rate: share of the response tokens outside the set of their state; about 1 - P.
        sorted_mass: entry k - 1 is the mean over states of the mass of the k most probable candidates (Figure 1 of
            the paper, over the recorded sets: beyond the end of a set its whole mass counts). None without logprobs.
    """

    num_states: int
    num_candidates: int
    mean_size: float
    size_quantiles: dict[float, int]
    size_histogram: list[tuple[int, int, int]]
    one_token_share: float
    mean_mass: float
    incomplete_share: float | None
    out_of_set_rate: float
    sorted_mass: list[float] | None


@dataclass(frozen=True, slots=True)
class OnlineSummary:
    """Rows of an online run.

    Attributes:
        num_steps: optimizer steps that have a row.
        student_share: share of the rows that the student's engines sampled.
        mean_staleness: mean over these rows of the steps by which the weights that sampled a row were older than those
            that its step started from: step - 1 - policy version. NaN without such rows.
        max_staleness: the largest of them; 0 without such rows.
    """

    num_steps: int
    student_share: float
    mean_staleness: float
    max_staleness: int


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """A whole store.

    Attributes:
        manifest: what the rows are.
        complete: all rows are there.
        num_rows: rows.
        num_prompt_tokens: over all rows.
        num_response_tokens: over all rows.
        size_bytes: shards on disk.
        bytes_per_token: size_bytes over num_response_tokens.
        mean_response_length: tokens.
        response_length_quantiles: quantile -> tokens, for QUANTILES.
        length_histogram: (shortest, longest, reason -> rows) of equal ranges of response lengths; no more than
            LENGTH_BINS.
        finish_reasons: reason -> rows.
        rows_by_teacher: name of the teacher -> rows; empty where there is one.
        num_states: states with a candidate set.
        sets: sizes and masses of the candidate sets; None where the store has none, or where each is the whole
            vocabulary (p = 1).
        online: who made the rows of an online run; None in other stores.
    """

    manifest: StoreManifest
    complete: bool
    num_rows: int
    num_prompt_tokens: int
    num_response_tokens: int
    size_bytes: int
    bytes_per_token: float
    mean_response_length: float
    response_length_quantiles: dict[float, int]
    length_histogram: list[tuple[int, int, dict[str, int]]]
    finish_reasons: dict[str, int]
    rows_by_teacher: dict[str, int]
    num_states: int
    sets: SetSummary | None
    online: OnlineSummary | None = None


def summary(reader: StoreReader) -> StoreSummary:
    """Read a store once and sum it up. Means and rates of nothing are NaN.

    Raises:
        StoreError: a row is damaged.
    """
    sets, manifest = _SetCounts(reader.manifest), reader.manifest
    staleness: list[int] = []
    lengths_by_reason: dict[str, Counter[int]] = {}
    rows_by_teacher = Counter(dict.fromkeys(manifest.teachers, 0))
    has_listed_sets = manifest.has_sets and not manifest.has_whole_sets
    for rollouts in reader.scan():
        for rollout in rollouts:
            lengths_by_reason.setdefault(rollout.finish_reason, Counter())[len(rollout.response_ids)] += 1
            if rollout.teacher is not None:
                rows_by_teacher[rollout.teacher] += 1
            if rollout.origin is not None and rollout.origin.policy_version is not None:
                staleness.append(rollout.origin.step - 1 - rollout.origin.policy_version)
            if rollout.sets is not None and has_listed_sets:
                sets.add(rollout, rollout.sets)
    num_response_tokens = int(reader.response_lengths.sum(dtype=np.int64))
    return StoreSummary(
        manifest=manifest,
        complete=reader.complete,
        num_rows=len(reader),
        num_prompt_tokens=int(reader.prompt_lengths.sum(dtype=np.int64)),
        num_response_tokens=num_response_tokens,
        size_bytes=reader.size_bytes,
        bytes_per_token=_ratio(reader.size_bytes, num_response_tokens),
        mean_response_length=_ratio(num_response_tokens, len(reader)),
        response_length_quantiles=_quantiles(np.bincount(reader.response_lengths)),
        length_histogram=_length_histogram(lengths_by_reason),
        finish_reasons={reason: lengths.total() for reason, lengths in sorted(lengths_by_reason.items())},
        rows_by_teacher=dict(rows_by_teacher),
        num_states=int(reader.num_states.sum(dtype=np.int64)),
        sets=sets.summary() if has_listed_sets else None,
        online=_online_summary(reader, staleness) if manifest.online else None,
    )


def _online_summary(reader: StoreReader, staleness: Sequence[int]) -> OnlineSummary:
    return OnlineSummary(
        num_steps=len(np.unique(reader.steps)),
        student_share=_ratio(len(staleness), len(reader)),
        mean_staleness=_ratio(sum(staleness), len(staleness)),
        max_staleness=max(staleness, default=0),
    )


def one_token_share(reader: StoreReader, *, top_p: float, always_include: Collection[int] = ()) -> float | None:
    """Share of the states whose candidate set is a single token, once the sets are cut to these options.

    There the projected policy is 1 whatever the student thinks, and the likelihood part of the objective is silent.

    Args:
        reader: of the store.
        top_p: p of the run, at most that of the store. A set becomes a single token where the first one has mass >= p.
        always_include: ids that belong to every set of the run.

    Returns:
        None where no ids are stored, or no rows.

    Raises:
        StoreError: a row is damaged.
    """
    if not reader.manifest.has_sets or reader.manifest.has_whole_sets:
        return None
    num_states, num_single, always = 0, 0, list(always_include)
    for rollouts in reader.scan():
        for sets in (rollout.sets for rollout in rollouts if rollout.sets is not None):
            first_S, state_M = sets.offsets[:-1], np.repeat(np.arange(sets.num_states), sets.sizes_S)
            single_S = sets.sizes_S == 1
            if sets.logprobs_M is not None:
                single_S |= np.exp(sets.logprobs_M[first_S]) >= top_p
            # Always-included ids stay, but those that a server did not tell (`max_candidates`) are not there.
            stays_M = np.isin(sets.ids_M, always)
            stays_M[first_S] = False
            single_S &= np.bincount(state_M[stays_M], minlength=sets.num_states) == 0
            num_states += len(first_S)
            num_single += int(single_S.sum())
    return num_single / num_states if num_states else None


class _SetCounts:
    """Running sums over rows."""

    def __init__(self, manifest: StoreManifest) -> None:
        self._manifest = manifest
        self._num_incomplete = 0
        self._states_by_size = np.zeros(1, np.int64)
        self._mass_sum = 0.0
        self._num_tokens = 0
        self._num_in_set = 0
        self._mass_by_rank_K = np.zeros(NUM_RANKS)

    def add(self, rollout: Rollout, sets: RecordedSets) -> None:
        self._count_sizes(sets.sizes_S)
        self._num_incomplete += count_incomplete([rollout], self._manifest)
        self._mass_sum += float(np.exp(-sets.neg_log_mass_S.astype(np.float64)).sum())
        state_M = np.repeat(np.arange(sets.num_states), sets.sizes_S)
        num_tokens = len(rollout.response_ids)
        # The state after the last token of a cut response has a set but no token; -1 is no id.
        taken_S = np.full(sets.num_states, -1, np.int64)
        taken_S[:num_tokens] = rollout.response_ids
        self._num_tokens += num_tokens
        self._num_in_set += int((sets.ids_M == taken_S[state_M]).sum())
        if sets.logprobs_M is not None:
            rank_M = np.arange(len(sets.ids_M)) - sets.offsets[state_M]
            near = rank_M < NUM_RANKS
            self._mass_by_rank_K += np.bincount(
                rank_M[near], weights=np.exp(sets.logprobs_M[near].astype(np.float64)), minlength=NUM_RANKS
            )

    def _count_sizes(self, sizes_S: NDArray[np.int64]) -> None:
        counts = np.bincount(sizes_S, minlength=len(self._states_by_size))
        counts[: len(self._states_by_size)] += self._states_by_size
        self._states_by_size = counts

    def summary(self) -> SetSummary:
        is_cut, has_logprobs = self._manifest.max_candidates is not None, self._manifest.has_logprobs
        num_states = int(self._states_by_size.sum())
        num_candidates = int((self._states_by_size * np.arange(len(self._states_by_size))).sum())
        return SetSummary(
            num_states=num_states,
            num_candidates=num_candidates,
            mean_size=_ratio(num_candidates, num_states),
            size_quantiles=_quantiles(self._states_by_size),
            size_histogram=_histogram(self._states_by_size),
            one_token_share=_ratio(int(self._states_by_size[1:2].sum()), num_states),
            mean_mass=_ratio(self._mass_sum, num_states),
            incomplete_share=_ratio(self._num_incomplete, num_states) if is_cut else None,
            out_of_set_rate=_ratio(self._num_tokens - self._num_in_set, self._num_tokens),
            # The mean of cumulative sums is the cumulative sum of means.
            sorted_mass=(np.cumsum(self._mass_by_rank_K) / max(num_states, 1)).tolist() if has_logprobs else None,
        )


def _ratio(numerator: float, denominator: int) -> float:
    return numerator / denominator if denominator else float("nan")


def _quantiles(counts: NDArray[np.int64]) -> dict[float, int]:
    """Smallest value whose cumulative share reaches each quantile; counts[v] observations have the value v."""
    cumulative = np.cumsum(counts)
    if len(cumulative) == 0 or cumulative[-1] == 0:
        return {}
    return {quantile: int(np.searchsorted(cumulative, quantile * cumulative[-1])) for quantile in QUANTILES}


def _length_histogram(lengths_by_reason: Mapping[str, Counter[int]]) -> list[tuple[int, int, dict[str, int]]]:
    longest = max((max(lengths) for lengths in lengths_by_reason.values()), default=0)
    width = max(1, -(-longest // LENGTH_BINS))
    bins = [(low, low + width - 1) for low in range(1, longest + 1, width)]
    return [
        (
            low,
            high,
            {
                reason: sum(lengths[length] for length in range(low, high + 1))
                for reason, lengths in sorted(lengths_by_reason.items())
            },
        )
        for low, high in bins
    ]


def _histogram(counts: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Counts in the bins 0, 1, 2, 3-4, 5-8, ... (low, high, count), from the first filled bin to the last."""
    bins = [(0, 0), (1, 1)]
    while bins[-1][1] < len(counts) - 1:
        bins.append((bins[-1][1] + 1, bins[-1][1] * 2))
    filled = [(low, high, int(counts[low : high + 1].sum())) for low, high in bins]
    places = [place for place, (_, _, count) in enumerate(filled) if count]
    return filled[places[0] : places[-1] + 1] if places else []
