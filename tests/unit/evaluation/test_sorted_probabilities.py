"""Fig. 1 from recorded sets: what is listed is exact, what is not is a bracket."""

import numpy as np
import pytest

from openrlhf_bd.evaluation.sorted_probabilities import bounds
from openrlhf_bd.records import RecordedSets


def make_sets(*states: list[tuple[int, float]]) -> RecordedSets:
    """Sets of (id, probability) pairs."""
    flat = [pair for state in states for pair in state]
    return RecordedSets(
        ids_M=np.array([token for token, _ in flat], np.int32),
        offsets=np.cumsum([0, *map(len, states)]).astype(np.int64),
        neg_log_mass_S=np.array([-np.log(sum(p for _, p in state)) for state in states], np.float32),
        logprobs_M=np.log(np.array([p for _, p in flat], np.float32)),
    )


def test_listed_ranks_are_exact_and_the_rest_is_a_bracket():
    """Within a set probabilities are known; beyond it none is likelier than the last, nor than what is left."""
    # State 1: .5 .3 listed, .2 left: ranks 3, 4 have at most min(.3, .2 / 1) = .2 and min(.3, .2 / 2) = .1.
    # State 2: .9 listed, .1 left: ranks 2, 3, 4 have at most .1, .05, .1 / 3.
    found = bounds([make_sets([(5, 0.5), (6, 0.3)], [(7, 0.9)])], top_p=0.8, num_ranks=4)
    assert found is not None
    assert found.probability_low == pytest.approx((0.7, 0.15, 0.0, 0.0))
    assert found.probability_high == pytest.approx((0.7, 0.2, 0.125, (0.1 + 0.1 / 3) / 2), abs=1e-6)
    # Masses: state 1: .5 .8 | .8 to min(.8 + .3, 1); state 2: .9 | .9 to 1.
    assert found.mass_low == pytest.approx((0.7, 0.85, 0.85, 0.85))
    assert found.mass_high == pytest.approx((0.7, 0.9, 1.0, 1.0))
    assert (found.num_states, found.num_rows) == (2, 1)
    assert found.mass(2) == pytest.approx((0.85, 0.9))


def test_a_token_that_every_set_holds_does_not_narrow_the_bracket():
    """A stop token at the end of a set may be rarer than tokens that are left out, so its rank is unknown."""
    # .8 and the stop token (id 0) at .01: left out .19, of which one token may have all. Rank 2 is at most .2 - the
    # bound does not use the stop token - and the mass of two tokens lies between .81 and 1.
    found = bounds([make_sets([(5, 0.8), (0, 0.01)])], top_p=0.8, always_include=[0], num_ranks=2)
    assert found is not None
    assert found.probability_low == pytest.approx((0.8, 0.0))
    assert found.probability_high == pytest.approx((0.8, 0.2))
    assert found.mass_low == pytest.approx((0.8, 0.81))
    assert found.mass_high == pytest.approx((0.8, 1.0))


def test_a_whole_distribution_has_no_bracket():
    """Where the listed tokens hold all the mass, both bounds agree at every rank."""
    found = bounds([make_sets([(1, 0.75), (2, 0.25)])], top_p=0.99, num_ranks=3)
    assert found is not None
    assert found.probability_low == pytest.approx(found.probability_high, abs=1e-6)
    assert found.mass_high == pytest.approx((0.75, 1.0, 1.0))
    assert found.mass_low == pytest.approx(found.mass_high, abs=1e-6)


def test_no_state_gives_nothing():
    """Without a recorded state there is nothing to draw."""
    assert bounds([], top_p=0.8) is None
