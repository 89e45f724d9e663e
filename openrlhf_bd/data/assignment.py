"""Which rank computes which rows in which micro-batch, from their lengths alone. NumPy only, no communication.

Every rank gets the same number of micro-batches, since DeepSpeed's ranks meet in each of them; where there are fewer
rows than micro-batches a filler takes the place: a row that is computed and counts nothing.

A row of L tokens costs a L + L^2: projections and the output head per token, attention per pair of tokens. Both are
equal at the length a = parameters / (layers * hidden size): 13 thousand tokens for GPT-2 small, 23 thousand for
Qwen2.5-0.5B. So tokens decide how long a micro-batch takes, and squares add to it. Balancing squares alone would let a
rank without a long row collect short ones without end. Therefore the longest rows, which hold most of the squares, are
spread by squares; the short rest, which hardly changes them, is spread by tokens and evens those out.
"""

# N items (rows and blocks of text) of a global batch, C micro-batches over all ranks

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SQUARES_FIRST = 0.9  # share of all squared lengths whose rows, the longest, are spread by squares
Layout = Literal["padded", "packed"]
Items = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MicroBatchLimit:
    """How large a micro-batch may be: by rows, or by tokens (with padding, where the layout has it).

    Attributes:
        rows: most rows; None where tokens count.
        tokens: most tokens; None where rows count. A longer row is a micro-batch by itself.
        layout: whether rows are padded to the longest of the micro-batch or packed into one sequence.
    """

    rows: int | None
    tokens: int | None
    layout: Layout


@dataclass(frozen=True, slots=True)
class Assignment:
    """One micro-batch of one rank.

    Attributes:
        items: places in the global batch, where rows come before blocks; at least one.
        counts: False for a filler, whose loss and metrics are multiplied by 0.
    """

    items: Items
    counts: bool


@dataclass(frozen=True, slots=True)
class Balance:
    """How well an assignment uses the ranks. Fillers count as positions computed, not as tokens.

    Attributes:
        num_micro_batches: of each rank.
        padding_share: share of the positions computed that are no token of the global batch.
        fill: tokens / (micro-batches of all ranks * token budget); None where micro-batches are limited by rows.
        token_imbalance: tokens of the rank with most / mean over ranks.
        square_imbalance: the same of the sum of squared lengths.
    """

    num_micro_batches: int
    padding_share: float
    fill: float | None
    token_imbalance: float
    square_imbalance: float


def assign(
    lengths_N: NDArray[np.integer], *, num_ranks: int, limit: MicroBatchLimit, num_rows: int | None = None
) -> list[list[Assignment]]:
    """Divide a global batch among ranks and micro-batches.

    As few micro-batches as best-fit packing into the budget needs, rounded up to the same number on every rank. Over
    all of them the items are spread, longest first. Micro-batches of about the same cost are computed by all ranks at
    the same time, the largest first, so that a budget that does not fit the memory fails at once.

    Args:
        lengths_N: tokens of each item.
        num_ranks: ranks.
        limit: size of a micro-batch.
        num_rows: the first so many items are rollouts, the others blocks of text, which padded micro-batches keep
            apart; None: all are rollouts.

    Returns:
        Micro-batches of each rank. Every item counts in exactly one of them. Depends on the arguments alone.
    """
    lengths = lengths_N.astype(np.int64)
    # Item numbers break ties, so that equal lengths keep their order on every machine.
    longest_first = np.argsort(-lengths, kind="stable")
    if limit.layout == "packed":
        parts = _packed_parts(longest_first, lengths, limit, num_ranks)
    else:
        kinds = [longest_first] if num_rows is None else _split_by_kind(longest_first, num_rows)
        parts = _padded_parts(kinds, lengths, limit, num_ranks)
    return _deal(parts, _costs(parts, lengths, limit.layout), num_ranks, filler=longest_first[-1:])


def balance_of(
    ranks: Sequence[Sequence[Assignment]], lengths_N: NDArray[np.integer], limit: MicroBatchLimit
) -> Balance:
    """How well an assignment uses the ranks and the budget.

    Args:
        ranks: what `assign` returned.
        lengths_N: tokens of each item.
        limit: size of a micro-batch.
    """
    lengths = lengths_N.astype(np.int64)
    tokens_R = np.array([sum(_tokens(part, lengths, 1) for part in rank) for rank in ranks])
    squares_R = np.array([sum(_tokens(part, lengths, 2) for part in rank) for rank in ranks])
    num_positions = sum(_positions(part.items, lengths, limit.layout) for rank in ranks for part in rank)
    num_parts = len(ranks) * len(ranks[0])
    return Balance(
        num_micro_batches=len(ranks[0]),
        padding_share=1.0 - float(tokens_R.sum()) / num_positions,
        fill=None if limit.tokens is None else float(tokens_R.sum()) / (num_parts * limit.tokens),
        token_imbalance=float(tokens_R.max() / tokens_R.mean()),
        square_imbalance=float(squares_R.max() / squares_R.mean()),
    )


def _tokens(part: Assignment, lengths: Items, power: int) -> int:
    return int((lengths[part.items] ** power).sum()) if part.counts else 0


def _positions(items: Items, lengths: Items, layout: Layout) -> int:
    return int(lengths[items].max() * len(items) if layout == "padded" else lengths[items].sum())


def _split_by_kind(longest_first: Items, num_rows: int) -> list[Items]:
    is_row = longest_first < num_rows
    return [kind for kind in (longest_first[is_row], longest_first[~is_row]) if len(kind)]


def _packed_parts(longest_first: Items, lengths: Items, limit: MicroBatchLimit, num_ranks: int) -> list[Items]:
    """Micro-batches of packed rows: at most a multiple of num_ranks, each within the limit."""
    # Limited by rows, each takes one unit of room, whatever its length.
    sizes = lengths if limit.tokens is not None else np.ones_like(lengths)
    room = limit.tokens if limit.tokens is not None else limit.rows
    assert room is not None
    tight = _best_fit(longest_first, sizes, room)
    num_parts = -(-len(tight) // num_ranks) * num_ranks
    return _spread(longest_first, lengths, sizes, room, num_parts) or _halved(tight, lengths, num_parts)


def _best_fit(longest_first: Items, sizes: Items, room: int) -> list[Items]:
    """Best-fit decreasing: each item into the fullest part that still holds it. Few parts, unevenly filled."""
    parts: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room left and part, ascending
    for item in longest_first.tolist():
        size = int(sizes[item])
        place = bisect_left(free, (size, -1))
        if place == len(free):
            left, part = room, len(parts)
            parts.append([])
        else:
            left, part = free.pop(place)
        parts[part].append(item)
        insort(free, (left - size, part))
    return [np.array(part, dtype=np.int64) for part in parts]


def _spread(longest_first: Items, lengths: Items, sizes: Items, room: int, num_parts: int) -> list[Items] | None:
    """Each item to the part with the least squares so far, short ones to that with the least tokens.

    Returns:
        At most num_parts parts, or None where some item finds no room.
    """
    squares = lengths[longest_first] ** 2
    num_long = 1 + int(np.searchsorted(np.cumsum(squares), SQUARES_FIRST * squares.sum()))
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    left = [room] * num_parts
    for items, power in ((longest_first[:num_long], 2), (longest_first[num_long:], 1)):
        weights = lengths**power
        loads = [int(weights[part].sum()) for part in parts]
        if not _place(items.tolist(), weights.tolist(), sizes.tolist(), loads, parts, left):
            return None
    return [np.array(part, dtype=np.int64) for part in parts if part]


def _place(
    items: Sequence[int],
    weights: Sequence[int],
    sizes: Sequence[int],
    loads: Sequence[int],
    parts: list[list[int]],
    left: list[int],
) -> bool:
    """Put each item into the part with the least load that has room left; an empty part has room for any.

    Each part waits at most once for each item that it took, so this is O(N log N).

    Args:
        items: to place, by size, largest first.
        weights: what an item adds to a load.
        sizes: room that an item takes.
        loads: of the parts so far.
        parts: items of each part; grows.
        left: room left in each part; shrinks.

    Returns:
        Whether all found a place.
    """
    open_parts = [(load, part) for part, load in enumerate(loads)]
    heapq.heapify(open_parts)
    waiting: list[tuple[int, int, int]] = []  # too full for the items of now: -room left, load, part
    for item in items:
        while waiting and -waiting[0][0] >= sizes[item]:
            _, load, part = heapq.heappop(waiting)
            heapq.heappush(open_parts, (load, part))
        while open_parts and parts[open_parts[0][1]] and left[open_parts[0][1]] < sizes[item]:
            load, part = heapq.heappop(open_parts)
            heapq.heappush(waiting, (-left[part], load, part))
        if not open_parts:
            return False
        load, part = open_parts[0]
        parts[part].append(item)
        left[part] -= sizes[item]
        heapq.heapreplace(open_parts, (load + weights[item], part))
    return True


def _halved(parts: list[Items], lengths: Items, num_parts: int) -> list[Items]:
    """Halve the parts with most tokens until there are num_parts, as far as items allow."""
    heap = [(-int(lengths[items].sum()), number, items) for number, items in enumerate(parts)]
    heapq.heapify(heap)
    done: list[Items] = []
    number = len(parts)
    while heap and len(heap) + len(done) < num_parts:
        _, _, items = heapq.heappop(heap)
        if len(items) == 1:
            done.append(items)
            continue
        # Every other item: both halves stay in order of length and hold about as much.
        for half in (items[::2], items[1::2]):
            heapq.heappush(heap, (-int(lengths[half].sum()), number, half))
            number += 1
    return done + [items for _, _, items in heap]


def _padded_parts(kinds: list[Items], lengths: Items, limit: MicroBatchLimit, num_ranks: int) -> list[Items]:
    """Micro-batches of padded rows, each kind by itself: at most a multiple of num_ranks, as even as can be.

    Rows are cut in order of length, so that rows of a micro-batch are about as long as each other.
    """
    most_rows = limit.rows or len(lengths)
    largest = limit.tokens if limit.tokens is not None else most_rows * int(lengths.max())
    num_cuts = sum(len(_cut(kind, lengths, most_rows, largest)) for kind in kinds)
    num_parts = -(-num_cuts // num_ranks) * num_ranks
    smallest = 1
    while smallest < largest:
        middle = (smallest + largest) // 2
        if sum(len(_cut(kind, lengths, most_rows, middle)) for kind in kinds) <= num_parts:
            largest = middle
        else:
            smallest = middle + 1
    return [part for kind in kinds for part in _cut(kind, lengths, most_rows, largest)]


def _cut(longest_first: Items, lengths: Items, most_rows: int, most_positions: int) -> list[Items]:
    """Cut rows in their order into parts of at most so many rows and, padded to their first, so many positions."""
    parts: list[Items] = []
    start = 0
    while start < len(longest_first):
        count = max(1, min(most_rows, most_positions // int(lengths[longest_first[start]])))
        parts.append(longest_first[start : start + count])
        start += count
    return parts


def _costs(parts: Sequence[Items], lengths: Items, layout: Layout) -> NDArray[np.float64]:
    """Cost of each part as its share of all tokens plus its share of all squares; padding costs what tokens do."""
    cost_N = lengths / lengths.sum() + lengths**2 / (lengths**2).sum()
    if layout == "padded":
        return np.array([cost_N[part].max() * len(part) for part in parts])
    return np.array([cost_N[part].sum() for part in parts])


def _deal(parts: list[Items], cost_C: NDArray[np.float64], num_ranks: int, *, filler: Items) -> list[list[Assignment]]:
    """Give each rank one part of every num_ranks costliest: the costliest to the rank with the least so far."""
    order = np.argsort(-cost_C, kind="stable").tolist()
    ranks: list[list[Assignment]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for start in range(0, len(order), num_ranks):
        group = order[start : start + num_ranks]
        by_load = sorted(range(num_ranks), key=lambda rank: (load[rank], rank))
        for rank, part in zip(by_load, group, strict=False):
            ranks[rank].append(Assignment(parts[part], counts=True))
            load[rank] += float(cost_C[part])
        for rank in by_load[len(group) :]:
            ranks[rank].append(Assignment(filler, counts=False))
    return ranks
