"""The tensors of a micro-batch."""

import numpy as np
import pytest
import torch

from openrlhf_bd.data.assignment import Layout
from openrlhf_bd.data.micro_batches import collate
from openrlhf_bd.errors import DataError
from openrlhf_bd.records import FinishReason, RecordedSets, Rollout

LAYOUTS: tuple[Layout, ...] = ("padded", "packed")


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


class TestRollouts:
    # Row a: prompt 7 8, response 1 2 (ended by 2). Row b: prompt 9, response 3 4 5, cut, with its bootstrap state.
    ROWS = (rollout("a:0", [7, 8], [1, 2], "stop", 2), rollout("b:0", [9], [3, 4, 5], "length", 4))

    def test_padded(self) -> None:
        """Padded: rows on the right side filled up, states at the token before each action."""
        batch = collate([self.ROWS[0], rollout("c:0", [9], [3], "stop", 1)], layout="padded", with_sets=True)
        assert batch.tokens.input_ids.tolist() == [[7, 8, 1, 2], [9, 3, 0, 0]]
        assert batch.tokens.attention_mask is not None
        assert batch.tokens.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        assert batch.tokens.state_index_S.tolist() == [1, 2, 4]  # 8, 1 | 9
        assert (batch.tokens.num_tokens, batch.tokens.num_positions) == (6, 8)

    def test_packed(self) -> None:
        """Packed: one sequence, position ids restart in each row, no mask."""
        batch = collate(self.ROWS, layout="packed", with_sets=True)
        assert batch.tokens.input_ids.tolist() == [[7, 8, 1, 2, 9, 3, 4, 5]]
        assert batch.tokens.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
        assert batch.tokens.attention_mask is None
        assert batch.tokens.state_index_S.tolist() == [1, 2, 4, 5, 6, 7]  # 8, 1 | 9, 3, 4, and 5 to bootstrap from
        assert batch.trajectories.taken_S.tolist() == [1, 2, 3, 4, 5, -1]
        assert batch.sets is not None
        assert batch.sets.num_states == 6

    def test_without_sets_there_is_no_bootstrap_state(self) -> None:
        """An algorithm that needs no sets sees one state per response token."""
        batch = collate(self.ROWS, layout="packed", with_sets=False)
        assert batch.sets is None
        assert batch.trajectories.taken_S.tolist() == [1, 2, 3, 4, 5]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_state_predicts_the_token_taken(self, layout: Layout) -> None:
        """The input right after a state's position is the token that was taken there."""
        batch = collate(self.ROWS, layout=layout, with_sets=True)
        action_S = batch.trajectories.has_action_S
        following = batch.tokens.input_ids.flatten()[batch.tokens.state_index_S[action_S] + 1]
        torch.testing.assert_close(following, batch.trajectories.taken_S[action_S])

    def test_row_without_prompt_is_refused(self) -> None:
        """A row without a prompt token is an error that names the row, not a wrong state."""
        with pytest.raises(DataError, match="row x:3: the prompt is empty"):
            collate([rollout("x:3", [], [1], "stop", 1)], layout="padded", with_sets=True)

    def test_row_without_response_is_refused(self) -> None:
        """A row without a response token is an error that names the row."""
        with pytest.raises(DataError, match="row x:3: the response is empty"):
            collate([self.ROWS[0], rollout("x:3", [1], [], "stop", 0)], layout="packed", with_sets=True)

    def test_missing_sets_are_refused(self) -> None:
        """Gold rows given to an algorithm that needs sets are an error that names the row."""
        with pytest.raises(DataError, match="row x:3: no candidate sets"):
            collate([rollout("x:3", [1], [1], "stop", None)], layout="padded", with_sets=True)

    def test_sets_that_do_not_fit_are_refused(self) -> None:
        """A row with too few sets is an error that names the row."""
        with pytest.raises(DataError, match="row x:3"):
            collate([rollout("x:3", [1], [1, 2, 3], "stop", 2)], layout="padded", with_sets=True)


BLOCKS = {"pre-training block 4": np.array([1, 2, 3], np.int32), "pre-training block 9": np.array([4, 5, 6], np.int32)}


class TestText:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_blocks(self, layout: Layout) -> None:
        """Every token of a pre-training block but the first is a target of the position before it."""
        batch = collate([], BLOCKS, layout=layout, with_sets=True)
        assert batch.target_P.tolist() == [2, 3, 5, 6]
        assert batch.tokens.input_ids.flatten()[batch.tokens.state_index_S].tolist() == [1, 2, 4, 5]
        assert batch.tokens.position_ids.flatten().tolist() == [0, 1, 2, 0, 1, 2]
        assert (batch.num_states, batch.num_targets, batch.sets) == (0, 4, None)

    def test_rows_and_text_in_one_pack(self) -> None:
        """States of the rollouts come first, then those of the text, and so do names."""
        batch = collate([rollout("a:0", [7, 8], [1, 2], "stop", 2)], BLOCKS, layout="packed", with_sets=True)
        assert batch.tokens.input_ids.tolist() == [[7, 8, 1, 2, 1, 2, 3, 4, 5, 6]]
        assert batch.tokens.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]
        assert batch.tokens.state_index_S.tolist() == [1, 2, 4, 5, 7, 8]
        assert (batch.num_states, batch.num_targets) == (2, 4)
        assert batch.names == ("row a:0", *BLOCKS)
