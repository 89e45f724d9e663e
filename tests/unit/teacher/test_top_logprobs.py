"""Candidate sets from the K likeliest tokens, worked out by hand."""

import numpy as np
import pytest

from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.teacher.states import NO_TOKEN
from openrlhf_bd.teacher.top_logprobs import record_top, top_set


def top(**probabilities: float) -> dict[int, float]:
    """top(t5=0.5) is {5: log 0.5}."""
    return {int(name[1:]): float(np.log(value)) for name, value in probabilities.items()}


def ids(found: list[tuple[int, float]]) -> list[int]:
    return [token for token, _ in found]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    # Cumulative mass: .5, .75, .875, .9375.
    [(0.4, [5]), (0.5, [5]), (0.6, [5, 3]), (0.75, [5, 3]), (0.9, [5, 3, 8, 1]), (0.99, [5, 3, 8, 1])],
)
def test_smallest_prefix_or_all_of_them(top_p: float, expected: list[int]) -> None:
    """The token that crosses p is the last one; where none does, all K are the set."""
    four = top(t1=1 / 16, t3=1 / 4, t5=1 / 2, t8=1 / 8)
    assert ids(top_set(four, 5, top_p=top_p, always_include=[], max_candidates=4)) == expected


def test_equal_tokens_come_by_lower_id() -> None:
    """Ties are broken as in `top_p_candidates`."""
    assert ids(top_set(top(t9=0.3, t2=0.3, t4=0.3), 9, top_p=0.5, always_include=[], max_candidates=3)) == [2, 4]


def test_taken_token_outside_the_likeliest_is_no_candidate() -> None:
    """What lies between it and the K is not known, so it cannot be part of a prefix."""
    five = top(t1=0.4, t2=0.2, t3=0.1, t7=0.05)
    assert ids(top_set(five, 7, top_p=0.9, always_include=[], max_candidates=3)) == [1, 2, 3]


def test_always_included_ids_are_there_where_they_are_known() -> None:
    """A stop token is in the set if it is among the K or taken; of another one nothing is known."""
    four = top(t1=0.5, t2=0.25, t0=0.125, t7=0.01)
    assert ids(top_set(four, 7, top_p=0.6, always_include=[0, 7, 9], max_candidates=3)) == [1, 2, 0, 7]
    assert ids(top_set(four, 7, top_p=0.8, always_include=[0], max_candidates=3)) == [1, 2, 0]


def test_states_of_a_cut_response() -> None:
    """Sets of T + 1 states, masses of what they hold, and the taken tokens' own log-probabilities."""
    states = [top(t1=0.5, t2=0.25, t7=0.05), top(t3=0.25, t4=0.125)]
    options = RecordOptions(0.6, (7,))
    recorded = record_top([7, NO_TOKEN], states, options, max_candidates=2)
    assert recorded.sets is not None
    assert recorded.sets.ids_M.tolist() == [1, 2, 7, 3, 4]
    assert recorded.sets.offsets.tolist() == [0, 3, 5]
    # .5 + .25 + .05 and .25 + .125
    np.testing.assert_allclose(np.exp(-recorded.sets.neg_log_mass_S), [0.8, 0.375], rtol=1e-6)
    np.testing.assert_allclose(np.exp(recorded.taken_logprob_S), [0.05, 1.0], rtol=1e-6)
    without = record_top([7, NO_TOKEN], states, RecordOptions(0.6, (7,), logprobs=False), max_candidates=2)
    assert without.sets is not None
    assert without.sets.logprobs_M is None


def test_no_sets_and_whole_sets_need_the_taken_token_alone() -> None:
    """Without sets, and with p = 1, one log-probability a state is enough."""
    states = [top(t7=0.5)]
    assert record_top([7], states, RecordOptions(None), max_candidates=20).sets is None
    whole = record_top([7], states, RecordOptions(1.0), max_candidates=20)
    assert whole.sets is not None
    assert whole.sets.is_whole
    assert whole.sets.num_states == 1
