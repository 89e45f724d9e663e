"""`teacher.states`: what is kept of the raw logits, by request and position."""

# Logits of the tests are logs of probabilities over V = 4 ids: .5, .3, .15, .05 at ids 2, 0, 3, 1.

import math

import numpy as np
import pytest
import torch

from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.teacher.states import NO_TOKEN, StateRecorder, record_states

PROBABILITIES = torch.tensor([0.3, 0.05, 0.5, 0.15])
# Raw logits have any level; 7 must not be seen in what is recorded.
LOGITS = PROBABILITIES.log() + 7.0


def test_recorded_state_is_the_inclusive_top_p_set_with_mass_and_logprobs() -> None:
    """A state holds Def. 1's set, ids always included behind it, its mass and the taken token's log-probability."""
    states = record_states(LOGITS[None], torch.tensor([3]), RecordOptions(top_p=0.6, always_include=(1,)))
    # 0.5 before id 0 is < 0.6, 0.8 before id 3 is not: {2, 0}, then id 1. Mass .5 + .3 + .05 = .85.
    assert states.sets is not None
    assert states.sets.ids_M.tolist() == [2, 0, 1]
    assert states.sets.offsets.tolist() == [0, 3]
    assert states.sets.neg_log_mass_S[0] == pytest.approx(-math.log(0.85), abs=1e-6)
    assert states.sets.logprobs_M is not None
    np.testing.assert_allclose(states.sets.logprobs_M, np.log([0.5, 0.3, 0.05]), atol=1e-6)
    assert states.taken_S.tolist() == [3]
    assert states.taken_logprob_S[0] == pytest.approx(math.log(0.15), abs=1e-6)
    assert (states.sets.ids_M.dtype, states.taken_logprob_S.dtype) == (np.int32, np.float32)


def test_without_top_p_only_the_taken_tokens_are_recorded() -> None:
    """`RecordOptions(top_p=None)` records log-probabilities and no sets; a state without a token has 0."""
    states = record_states(LOGITS.expand(2, 4), torch.tensor([0, NO_TOKEN]), RecordOptions(top_p=None))
    assert states.sets is None
    assert states.taken_S.tolist() == [0, NO_TOKEN]
    np.testing.assert_allclose(states.taken_logprob_S, [math.log(0.3), 0.0], atol=1e-6)


def test_p_of_one_records_no_ids() -> None:
    """At p = 1 each set is the whole vocabulary: states are counted, no id is listed, through `take` and rows."""
    recorder = StateRecorder(RecordOptions(top_p=1.0, always_include=(1,)))
    recorder.record(LOGITS.expand(3, 4), [(0, 0), (0, 1), (1, 0)], torch.tensor([3, 2, NO_TOKEN]))
    rows = list(recorder.take([1, 0], [1, 2]).rows())
    assert [row.sets.num_states for row in rows if row.sets is not None] == [1, 2]
    assert all(row.sets is not None and row.sets.is_whole for row in rows)
    np.testing.assert_allclose(rows[1].taken_logprob_S, [math.log(0.15), math.log(0.5)], atol=1e-6)


def test_rows_come_back_in_order_of_position_whatever_order_they_were_recorded_in() -> None:
    """Requests of several steps are put together by position, each with its own sets."""
    recorder = StateRecorder(RecordOptions(top_p=0.4))
    # At p = .4 the set is the most likely id alone; these rows have it at 0, 1, 2, 3.
    peaked = torch.eye(4) * 5.0
    recorder.record(peaked[[1, 3]], [(10, 1), (11, 0)], torch.tensor([1, 3]))
    recorder.record(peaked[[0, 2]], [(10, 0), (11, 1)], torch.tensor([0, 2]))
    rows = list(recorder.take([11, 10], [2, 2]).rows())
    assert [row.taken_S.tolist() for row in rows] == [[3, 2], [0, 1]]
    assert [row.sets.ids_M.tolist() for row in rows if row.sets is not None] == [[3, 2], [0, 1]]
    assert [row.sets.offsets.tolist() for row in rows if row.sets is not None] == [[0, 1, 2], [0, 1, 2]]


def test_position_computed_again_replaces_the_earlier_one() -> None:
    """Recomputation leaves neither a duplicate nor a stale state."""
    recorder = StateRecorder(RecordOptions(top_p=0.4))
    peaked = torch.eye(4) * 5.0
    recorder.record(peaked[:2], [(0, 0), (0, 1)], torch.tensor([0, 1]))
    recorder.record(peaked[3:], [(0, 1)], torch.tensor([3]))
    (row,) = recorder.take([0], [2]).rows()
    assert row.taken_S.tolist() == [0, 3]
    assert row.sets is not None
    assert row.sets.ids_M.tolist() == [0, 3]


def test_missing_position_is_an_error() -> None:
    """A request with a gap, or one that was never recorded, is refused by name."""
    recorder = StateRecorder(RecordOptions(top_p=0.4))
    recorder.record(LOGITS.expand(2, 4), [(5, 0), (5, 2)], torch.tensor([0, 0]))
    with pytest.raises(RuntimeError, match=r"request 5: found 2 positions without \[1\]"):
        recorder.take([5], [3])
    with pytest.raises(RuntimeError, match=r"request 5: found 0 positions without \[0\], expected all of 1"):
        recorder.take([5], [1])


def test_state_beyond_those_asked_for_is_dropped() -> None:
    """The sample that a scheduler one step ahead draws after a stop token does not get into the row."""
    recorder = StateRecorder(RecordOptions(top_p=0.4))
    recorder.record(torch.eye(4)[:3] * 5.0, [(0, 0), (0, 1), (0, 2)], torch.tensor([0, 1, 2]))
    (row,) = recorder.take([0], [2]).rows()
    assert row.taken_S.tolist() == [0, 1]
    assert row.sets is not None
    assert row.sets.num_states == 2
