import numpy as np
import pytest
import torch

from openrlhf_bd.functional.trajectories import Trajectories, num_states, reduction_weights
from openrlhf_bd.records import RecordedSets, Rollout


def rollout(tokens: list[int], reason: str, num_sets: int | None = None) -> Rollout:
    sets = None
    if num_sets is not None:
        ids = np.zeros(num_sets, np.int32)
        sets = RecordedSets(ids, np.arange(num_sets + 1), np.zeros(num_sets, np.float32), None)
    return Rollout("p:0", np.array([9], np.int32), np.array(tokens, np.int32), reason, None, sets)  # type: ignore[arg-type]


def test_layout_of_three_rows() -> None:
    """A stopped row, a cut row with a state to bootstrap from, and a cut row without one."""
    rows = [rollout([5, 0], "stop", 2), rollout([6, 7], "length", 3), rollout([8], "length", 1)]
    trajectories = Trajectories.from_rollouts(rows)
    assert trajectories.taken_S.tolist() == [5, 0, 6, 7, -1, 8]
    assert trajectories.next_S.tolist() == [1, -1, 3, 4, -1, -1]
    assert trajectories.terminal_S.tolist() == [False, True, False, False, False, False]
    assert trajectories.row_S.tolist() == [0, 0, 1, 1, 1, 2]
    assert trajectories.has_action_S.tolist() == [True, True, True, True, False, True]
    assert [num_states(row) for row in rows] == [2, 3, 1]


def test_what_is_terminal_does_not_depend_on_token_ids() -> None:
    """The same tokens are terminal or not as the finish reason says: pad = eos changes nothing."""
    assert Trajectories.from_rollouts([rollout([0, 0], "stop")]).terminal_S.tolist() == [False, True]
    assert Trajectories.from_rollouts([rollout([0, 0], "length")]).terminal_S.tolist() == [False, False]
    assert Trajectories.from_rollouts([rollout([0, 0], "length")]).has_action_S.all()


def test_rows_without_sets_have_a_state_for_each_token() -> None:
    """Gold responses carry no sets: T states."""
    assert Trajectories.from_rollouts([rollout([1, 2, 3], "length")]).num_states == 3


def test_rows_that_do_not_fit_are_refused() -> None:
    """An empty response, a missing set, one set too many after a stop, and no row are errors."""
    with pytest.raises(ValueError, match="row p:0: the response is empty"):
        Trajectories.from_rollouts([rollout([], "stop")])
    with pytest.raises(ValueError, match="1 candidate sets for 2 response tokens"):
        Trajectories.from_rollouts([rollout([1, 2], "stop", 1)])
    with pytest.raises(ValueError, match='3 candidate sets for 2 response tokens that ended by "stop"'):
        Trajectories.from_rollouts([rollout([1, 2], "stop", 3)])
    with pytest.raises(ValueError, match="no row"):
        Trajectories.from_rollouts([])


def test_reduction_weights() -> None:
    """token: 1 for each action; sequence: 1 / T of its row; 0 for a state that only bootstraps."""
    trajectories = Trajectories.from_rollouts([rollout([5, 0], "stop", 2), rollout([6, 7, 8, 9], "length", 5)])
    assert reduction_weights(trajectories, "token").tolist() == [1, 1, 1, 1, 1, 1, 0]
    assert reduction_weights(trajectories, "sequence").tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0]
    assert torch.equal(trajectories.to("cpu").taken_S, trajectories.taken_S)
