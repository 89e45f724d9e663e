"""Micro-batches: who gets which rows, and the tensors of them."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_bd.data.micro_batches import (
    Assignment,
    Layout,
    MicroBatchLimit,
    assign_rows,
    collate_blocks,
    collate_rollouts,
)
from openrlhf_bd.errors import DataError
from openrlhf_bd.records import FinishReason, RecordedSets, Rollout

LAYOUTS: tuple[Layout, ...] = ("padded", "packed")


def rows_of(assignments: Sequence[Assignment]) -> list[list[int]]:
    return [assignment.rows.tolist() if assignment.counts else [] for assignment in assignments]


def sets_of(num_states: int, first_id: int = 0) -> RecordedSets:
    ids = np.arange(first_id, first_id + num_states, dtype=np.int32)
    return RecordedSets(ids, np.arange(num_states + 1, dtype=np.int64), np.zeros(num_states, np.float32), None)


def rollout(row_id: str, prompt: list[int], response: list[int], finish: FinishReason, sets: int | None) -> Rollout:
    return Rollout(
        row_id=row_id,
        prompt_ids=np.array(prompt, np.int32),
        response_ids=np.array(response, np.int32),
        finish_reason=finish,
        sets=None if sets is None else sets_of(sets),
    )


class TestAssignment:
    @settings(deadline=None, max_examples=200)
    @given(
        lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
        num_ranks=st.integers(1, 6),
        limit=st.one_of(
            st.builds(MicroBatchLimit, rows=st.integers(1, 9), tokens=st.none(), layout=st.sampled_from(LAYOUTS)),
            st.builds(MicroBatchLimit, rows=st.none(), tokens=st.integers(1, 120), layout=st.sampled_from(LAYOUTS)),
        ),
    )
    def test_every_row_counts_once_and_ranks_meet(
        self, lengths: list[int], num_ranks: int, limit: MicroBatchLimit
    ) -> None:
        """Every row counts exactly once, ranks have equally many micro-batches, none is empty, limits are kept."""
        lengths_N = np.array(lengths)
        ranks = assign_rows(lengths_N, num_ranks=num_ranks, limit=limit)
        assert len(ranks) == num_ranks
        assert len({len(assignments) for assignments in ranks}) == 1
        counted = [row for rank in ranks for rows in rows_of(rank) for row in rows]
        assert sorted(counted) == list(range(len(lengths)))
        for assignment in (assignment for rank in ranks for assignment in rank):
            size = len(assignment.rows)
            longest = lengths_N[assignment.rows].max()
            tokens = longest * size if limit.layout == "padded" else lengths_N[assignment.rows].sum()
            assert size >= 1
            assert limit.rows is None or size <= limit.rows
            assert limit.tokens is None or tokens <= limit.tokens or size == 1

    def test_ranks_get_about_the_same_tokens(self) -> None:
        """Long rows are spread over ranks: no rank has two of the longest while another has none."""
        # Longest first, to the rank with the fewest tokens: 9 -> rank 0, 8 -> rank 1, 2 -> rank 1, 1 -> rank 0.
        limit = MicroBatchLimit(rows=2, tokens=None, layout="padded")
        ranks = assign_rows(np.array([1, 9, 8, 2]), num_ranks=2, limit=limit)
        assert [rows_of(rank) for rank in ranks] == [[[1, 0]], [[2, 3]]]

    def test_rows_of_a_micro_batch_have_similar_lengths(self) -> None:
        """Rows are sorted by length within a rank, so that short rows are not padded to long ones."""
        limit = MicroBatchLimit(rows=2, tokens=None, layout="padded")
        [rank] = assign_rows(np.array([9, 1, 8, 2]), num_ranks=1, limit=limit)
        assert rows_of(rank) == [[0, 2], [3, 1]]

    def test_token_limit_counts_padding_only_where_there_is_some(self) -> None:
        """A limit of 12 tokens holds rows of 6, 4 and 2 packed, but only two of them padded to 6."""
        lengths = np.array([6, 4, 2])
        padded = assign_rows(lengths, num_ranks=1, limit=MicroBatchLimit(rows=None, tokens=12, layout="padded"))
        packed = assign_rows(lengths, num_ranks=1, limit=MicroBatchLimit(rows=None, tokens=12, layout="packed"))
        assert rows_of(padded[0]) == [[0, 1], [2]]
        assert rows_of(packed[0]) == [[0, 1, 2]]

    def test_fewer_rows_than_ranks(self) -> None:
        """A rank without rows computes a filler that counts nothing, so that it meets the others."""
        limit = MicroBatchLimit(rows=4, tokens=None, layout="padded")
        ranks = assign_rows(np.array([5, 3]), num_ranks=3, limit=limit)
        assert [rows_of(rank) for rank in ranks] == [[[0]], [[1]], [[]]]
        assert ranks[2][0].rows.tolist() == [1]


class TestRollouts:
    # Row a: prompt 7 8, response 1 2 (ended by 2). Row b: prompt 9, response 3 4 5, cut, with its bootstrap state.
    ROWS = (rollout("a:0", [7, 8], [1, 2], "stop", 2), rollout("b:0", [9], [3, 4, 5], "length", 4))

    def test_padded(self) -> None:
        """Padded: rows on the right side filled up, states at the token before each action."""
        batch = collate_rollouts([self.ROWS[0], rollout("c:0", [9], [3], "stop", 1)], layout="padded", with_sets=True)
        assert batch.tokens.input_ids.tolist() == [[7, 8, 1, 2], [9, 3, 0, 0]]
        assert batch.tokens.attention_mask is not None
        assert batch.tokens.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        assert batch.tokens.state_index_S.tolist() == [1, 2, 4]  # 8, 1 | 9
        assert (batch.tokens.num_tokens, batch.tokens.num_positions) == (6, 8)

    def test_packed(self) -> None:
        """Packed: one sequence, position ids restart in each row, no mask."""
        batch = collate_rollouts(self.ROWS, layout="packed", with_sets=True)
        assert batch.tokens.input_ids.tolist() == [[7, 8, 1, 2, 9, 3, 4, 5]]
        assert batch.tokens.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
        assert batch.tokens.attention_mask is None
        assert batch.tokens.state_index_S.tolist() == [1, 2, 4, 5, 6, 7]  # 8, 1 | 9, 3, 4, and 5 to bootstrap from
        assert batch.trajectories.taken_S.tolist() == [1, 2, 3, 4, 5, -1]
        assert batch.sets is not None
        assert batch.sets.num_states == 6

    def test_without_sets_there_is_no_bootstrap_state(self) -> None:
        """An algorithm that needs no sets sees one state per response token."""
        batch = collate_rollouts(self.ROWS, layout="packed", with_sets=False)
        assert batch.sets is None
        assert batch.trajectories.taken_S.tolist() == [1, 2, 3, 4, 5]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_state_predicts_the_token_taken(self, layout: Layout) -> None:
        """The input right after a state's position is the token that was taken there."""
        batch = collate_rollouts(self.ROWS, layout=layout, with_sets=True)
        action_S = batch.trajectories.has_action_S
        following = batch.tokens.input_ids.flatten()[batch.tokens.state_index_S[action_S] + 1]
        torch.testing.assert_close(following, batch.trajectories.taken_S[action_S])

    def test_row_without_prompt_is_refused(self) -> None:
        """A row without a prompt token is an error that names the row, not a wrong state."""
        with pytest.raises(DataError, match="row x:3: the prompt is empty"):
            collate_rollouts([rollout("x:3", [], [1], "stop", 1)], layout="padded", with_sets=True)

    def test_missing_sets_are_refused(self) -> None:
        """Gold rows given to an algorithm that needs sets are an error that names the row."""
        with pytest.raises(DataError, match="row x:3: no candidate sets"):
            collate_rollouts([rollout("x:3", [1], [1], "stop", None)], layout="padded", with_sets=True)

    def test_sets_that_do_not_fit_are_refused(self) -> None:
        """A row with too few sets is an error that names the row."""
        with pytest.raises(DataError, match="row x:3"):
            collate_rollouts([rollout("x:3", [1], [1, 2, 3], "stop", 2)], layout="padded", with_sets=True)


def test_blocks() -> None:
    """Every token of a pre-training block but the first is a target of the position before it."""
    batch = collate_blocks(np.array([[1, 2, 3], [4, 5, 6]], np.int32))
    assert batch.target_S.tolist() == [2, 3, 5, 6]
    assert batch.tokens.input_ids.flatten()[batch.tokens.state_index_S].tolist() == [1, 2, 4, 5]
    assert batch.tokens.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
