"""Who computes which rows in which micro-batch."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_bd.data.assignment import Assignment, Layout, MicroBatchLimit, assign, balance_of

LAYOUTS: tuple[Layout, ...] = ("padded", "packed")


def by_tokens(tokens: int, layout: Layout = "packed") -> MicroBatchLimit:
    return MicroBatchLimit(rows=None, tokens=tokens, layout=layout)


def by_rows(rows: int, layout: Layout = "packed") -> MicroBatchLimit:
    return MicroBatchLimit(rows=rows, tokens=None, layout=layout)


def items_of(rank: Sequence[Assignment]) -> list[list[int]]:
    return [sorted(part.items.tolist()) if part.counts else [] for part in rank]


@settings(deadline=None, max_examples=300)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    num_blocks=st.integers(0, 6),
    num_ranks=st.integers(1, 6),
    layout=st.sampled_from(LAYOUTS),
    rows=st.integers(1, 9),
    tokens=st.one_of(st.none(), st.integers(1, 120)),
)
def test_every_item_counts_once_and_ranks_meet(
    lengths: list[int], num_blocks: int, num_ranks: int, layout: Layout, rows: int, tokens: int | None
) -> None:
    """Every item counts exactly once, ranks have equally many micro-batches, none is empty, limits are kept."""
    limit = MicroBatchLimit(rows=None if tokens else rows, tokens=tokens, layout=layout)
    lengths_N = np.array(lengths + [32] * num_blocks)
    ranks = assign(lengths_N, num_ranks=num_ranks, limit=limit, num_rows=len(lengths))
    assert len(ranks) == num_ranks
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(item for rank in ranks for items in items_of(rank) for item in items) == list(range(len(lengths_N)))
    for part in (part for rank in ranks for part in rank):
        size = len(part.items)
        assert size >= 1
        positions = lengths_N[part.items].max() * size if layout == "padded" else lengths_N[part.items].sum()
        assert limit.rows is None or size <= limit.rows
        assert limit.tokens is None or positions <= limit.tokens or size == 1
        if layout == "padded":
            assert len({item < len(lengths) for item in part.items.tolist()}) == 1, "rows and text in one padded batch"


def fewest_parts(lengths: tuple[int, ...], room: int) -> int:
    """Bin packing by exhaustive search over subsets."""
    count = len(lengths)
    total = [sum(length for i, length in enumerate(lengths) if mask >> i & 1) for mask in range(1 << count)]

    @cache
    def fewest(mask: int) -> int:
        if not mask:
            return 0
        first = mask & -mask
        rest, best, subset = mask ^ first, count, mask ^ first
        while True:
            if total[subset | first] <= room:
                best = min(best, 1 + fewest(rest ^ subset))
            if not subset:
                return best
            subset = (subset - 1) & rest

    return fewest((1 << count) - 1)


def test_no_more_micro_batches_than_the_budget_needs() -> None:
    """One rank's packed micro-batches are as few as exhaustive search finds, but for one in a hundred cases."""
    random = np.random.default_rng(0)
    differences = []
    for _ in range(200):
        lengths = tuple(random.integers(1, 20, random.integers(1, 10)).tolist())
        [rank] = assign(np.array(lengths), num_ranks=1, limit=by_tokens(20))
        differences.append(len(rank) - fewest_parts(lengths, 20))
    assert min(differences) == 0
    assert max(differences) <= 1
    assert sum(differences) <= 2


def dolly_like(num_rows: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(4.9, 0.8, num_rows), 16, 512).astype(int)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_are_balanced_in_tokens_and_in_squares(num_ranks: int) -> None:
    """No rank has 1 % more tokens, or 3 % more attention, than the mean."""
    lengths = dolly_like(256)
    balance = balance_of(assign(lengths, num_ranks=num_ranks, limit=by_tokens(4096)), lengths, by_tokens(4096))
    assert balance.token_imbalance < 1.01
    assert balance.square_imbalance < 1.03


def test_micro_batches_of_the_same_moment_cost_about_the_same() -> None:
    """Ranks that meet after each micro-batch (ZeRO-3) do not wait for each other: costs at each place are close."""
    lengths = dolly_like(512)
    ranks = assign(lengths, num_ranks=4, limit=by_tokens(4096))
    tokens = np.array([[lengths[part.items].sum() for part in rank] for rank in ranks])
    assert (tokens.max(axis=0) / tokens.min(axis=0)).max() < 1.05


def test_long_rows_are_spread() -> None:
    """Long rows by squares, longest first: 9 | 8. They hold 145 of 150, so the rest goes by tokens: 2 to 8, 1 to 9."""
    ranks = assign(np.array([1, 9, 8, 2]), num_ranks=2, limit=by_rows(3))
    assert [items_of(rank) for rank in ranks] == [[[0, 1]], [[2, 3]]]


def test_short_rows_make_up_for_a_long_one() -> None:
    """A rank with a long row gets no short ones until the others have as many tokens: 40 | 4 times 10."""
    lengths = np.array([40, *[10] * 4, *[1] * 20])
    limit = by_tokens(100)
    balance = balance_of(assign(lengths, num_ranks=2, limit=limit), lengths, limit)
    # By squares alone the first rank would get 40 and the second all else: 60.
    assert balance.token_imbalance == 1.0


def test_a_tight_budget_is_packed_all_the_same() -> None:
    """Where spreading by cost finds no room, best-fit packing still does: 6 + 4, 5 + 5, 7 + 3 fill three tens."""
    ranks = assign(np.array([6, 4, 5, 5, 7, 3]), num_ranks=1, limit=by_tokens(10))
    assert sorted(items_of(ranks[0])) == [[0, 1], [2, 3], [4, 5]]


def test_padded_rows_are_cut_in_order_of_length() -> None:
    """Short rows are not padded to long ones."""
    [rank] = assign(np.array([9, 1, 8, 2]), num_ranks=1, limit=by_rows(2, "padded"))
    assert items_of(rank) == [[0, 2], [1, 3]]


def test_token_limit_counts_padding_only_where_there_is_some() -> None:
    """A limit of 12 tokens holds rows of 6, 4 and 2 packed, but only two of them padded to 6."""
    lengths = np.array([6, 4, 2])
    assert items_of(assign(lengths, num_ranks=1, limit=by_tokens(12))[0]) == [[0, 1, 2]]
    # 6 + 6 fits, 6 + 6 + 6 does not; of the even splits, {6} and {4, 2} has the smaller largest part: 8, not 12.
    assert items_of(assign(lengths, num_ranks=1, limit=by_tokens(12, "padded"))[0]) == [[1, 2], [0]]


def test_fewer_rows_than_ranks() -> None:
    """A rank without rows computes the shortest one as a filler that counts nothing, so that it meets the others."""
    ranks = assign(np.array([5, 3]), num_ranks=3, limit=by_rows(4))
    assert [items_of(rank) for rank in ranks] == [[[0]], [[1]], [[]]]
    assert ranks[2][0].items.tolist() == [1]


def test_balance() -> None:
    """Shares and imbalances by hand: ranks of 6 + 2 and 4 tokens under a budget of 10, and one filler."""
    lengths = np.array([6, 2, 4])
    parts = {name: np.array(items) for name, items in {"a": [0], "b": [1], "c": [2]}.items()}
    ranks = [
        [Assignment(parts["a"], counts=True), Assignment(parts["b"], counts=True)],
        [Assignment(parts["c"], counts=True), Assignment(parts["b"], counts=False)],
    ]
    balance = balance_of(ranks, lengths, by_tokens(10))
    assert balance.num_micro_batches == 2
    assert balance.padding_share == pytest.approx(2 / 14)  # the filler's two positions
    assert balance.fill == pytest.approx(12 / 40)
    assert balance.token_imbalance == pytest.approx(8 / 6)
    assert balance.square_imbalance == pytest.approx(40 / 28)  # 36 + 4 against 16
    assert balance_of(ranks, lengths, by_rows(1)).fill is None
