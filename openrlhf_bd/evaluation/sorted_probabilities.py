"""The teacher's sorted token probabilities (Fig. 1 of the paper) from recorded sets: what they tell, and no more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.records import RecordedSets
from openrlhf_bd.store import StoreReader

# S states, M candidates of all sets of a row, K ranks.

NUM_RANKS = 50
MAX_ROWS = 2000


@dataclass(frozen=True, slots=True)
class SortedProbabilities:
    """Means over states by rank k = 1 ... K, entry k - 1: bounds that hold whatever the sets leave out.

    A set lists its state's most probable tokens exactly. A token that it leaves out is no more probable than the last
    one that it lists, and all of them together have what mass is left: that gives the upper bounds; the lower ones
    count it as nothing.

    Attributes:
        probability_low, probability_high: of the k-th most probable token.
        mass_low, mass_high: of the k most probable tokens together.
        num_states: states in the means.
        num_rows: responses they come from.
        top_p: mass that the sets hold.
    """

    probability_low: tuple[float, ...]
    probability_high: tuple[float, ...]
    mass_low: tuple[float, ...]
    mass_high: tuple[float, ...]
    num_states: int
    num_rows: int
    top_p: float

    def mass(self, k: int) -> tuple[float, float]:
        """Lower and upper bound of the mean mass of the k most probable tokens."""
        return self.mass_low[k - 1], self.mass_high[k - 1]


def sorted_probabilities(reader: StoreReader, *, max_rows: int = MAX_ROWS) -> SortedProbabilities | None:
    """Fig. 1 from a store, over at most max_rows rows that are spread evenly.

    Returns:
        None where the store has no sets with log-probabilities (gold responses, whole vocabularies, ids alone).

    Raises:
        StoreError: a row is damaged.
    """
    manifest = reader.manifest
    if not manifest.has_sets or manifest.has_whole_sets or not manifest.has_logprobs or manifest.top_p is None:
        return None
    count = min(len(reader), max_rows)
    rows = reader.rollouts([index * len(reader) // count for index in range(count)]) if count else []
    sets = [rollout.sets for rollout in rows if rollout.sets is not None]
    return bounds(sets, top_p=manifest.top_p, always_include=manifest.always_include)


def bounds(
    rows: Iterable[RecordedSets], *, top_p: float, always_include: Iterable[int] = (), num_ranks: int = NUM_RANKS
) -> SortedProbabilities | None:
    """Bounds of the sorted probabilities over the states of these rows; None without a state.

    Args:
        rows: sets with log-probabilities, most probable token first.
        top_p: mass that the sets hold.
        always_include: ids that every set holds; at its end they may be less probable than tokens that it leaves out.
        num_ranks: K.
    """
    always = np.fromiter(always_include, dtype=np.int64)
    sums = np.zeros((4, num_ranks))
    num_states = num_rows = 0
    for sets in rows:
        if sets.logprobs_M is None:
            continue
        sums += np.stack([bound_SK.sum(axis=0) for bound_SK in _row_bounds(sets, sets.logprobs_M, always, num_ranks)])
        num_states += sets.num_states
        num_rows += 1
    if not num_states:
        return None
    low, high, mass_low, mass_high = (tuple(bound_K.tolist()) for bound_K in sums / num_states)
    return SortedProbabilities(low, high, mass_low, mass_high, num_states, num_rows, top_p)


def _row_bounds(
    sets: RecordedSets, logprobs_M: NDArray[np.float32], always: NDArray[np.int64], num_ranks: int
) -> tuple[NDArray[np.float64], ...]:
    """(probability low, high, mass low, high) of the states of one row, each [S, K]."""
    probability_M = np.exp(logprobs_M.astype(np.float64))
    first_S, size_S = sets.offsets[:-1], sets.sizes_S
    state_M = np.repeat(np.arange(sets.num_states), size_S)
    place_M = np.arange(len(probability_M)) - first_S[state_M]
    # Ranks are certain up to the last token that is not there merely because every set has it.
    certain_M = ~np.isin(sets.ids_M, always) | (place_M == 0)
    certain_S = np.zeros(sets.num_states, np.int64)
    np.maximum.at(certain_S, state_M[certain_M], place_M[certain_M] + 1)

    listed_SK = np.zeros((sets.num_states, num_ranks))
    inside_M = place_M < num_ranks
    listed_SK[state_M[inside_M], place_M[inside_M]] = probability_M[inside_M]
    mass_low_SK = np.minimum(np.cumsum(listed_SK, axis=1), 1.0)

    rank_K = np.arange(1, num_ranks + 1)
    is_certain_SK = rank_K <= certain_S[:, None]
    known_S = np.bincount(state_M, probability_M * (place_M < certain_S[state_M]), minlength=sets.num_states)
    beyond_SK = np.maximum(rank_K - certain_S[:, None], 1)
    left_S1 = np.maximum(1.0 - known_S, 0.0)[:, None]
    last_S1 = probability_M[first_S + certain_S - 1][:, None]
    low_SK = np.where(is_certain_SK, listed_SK, 0.0)
    high_SK = np.where(is_certain_SK, listed_SK, np.minimum(last_S1, left_S1 / beyond_SK))
    beyond_mass_SK = np.minimum(known_S[:, None] + beyond_SK * last_S1, 1.0)
    mass_high_SK = np.where(is_certain_SK, mass_low_SK, np.maximum(beyond_mass_SK, mass_low_SK))
    return low_SK, high_SK, mass_low_SK, mass_high_SK
