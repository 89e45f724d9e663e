"""Requests: seeds and limits. The dispatch itself runs on real actors in tests/integration."""

import numpy as np
import pytest

from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.sampling import make_requests, request_seed
from openrlhf_bd.evaluation.scored import example_indices
from openrlhf_bd.records import Prompt


def prompt_of(length: int, name: str = "p") -> Prompt:
    return Prompt(name, np.arange(length, dtype=np.int32), {})


def test_a_request_seed_depends_on_seed_and_prompt_alone():
    """The seed of a request is the same whatever its place, and differs between prompts and between seeds."""
    one, other = prompt_of(3, "a"), prompt_of(3, "b")
    first, second = make_requests([one, other], seed=10, max_new_tokens=4, max_len=8)
    swapped = make_requests([other, one], seed=10, max_new_tokens=4, max_len=8)
    assert [request.seed for request in swapped] == [second.seed, first.seed]
    assert len({first.seed, second.seed, request_seed(20, "a"), request_seed(20, "b")}) == 4


def test_request_seeds_are_what_a_sampler_takes():
    """Seeds lie in [0, 2^31) and do not change between releases."""
    seeds = [request_seed(10, f"p{i}") for i in range(1000)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == 1000
    assert request_seed(10, "p0") == 1442787245


def test_responses_stay_within_both_limits():
    """A response ends at max_new_tokens or where prompt and response fill max_len, whichever comes first."""
    prompts = [prompt_of(2), prompt_of(7)]
    assert [r.max_new_tokens for r in make_requests(prompts, seed=1, max_new_tokens=4, max_len=10)] == [4, 3]
    assert [r.max_new_tokens for r in make_requests(prompts, seed=1, max_new_tokens=None, max_len=10)] == [8, 3]


def test_a_prompt_without_room_is_named():
    """A prompt that fills max_len is an error that names it, before any engine is asked."""
    with pytest.raises(DataError, match=r"prompt long: found 10 tokens.*--data\.max_len 10"):
        make_requests([prompt_of(10, "long")], seed=1, max_new_tokens=4, max_len=10)


def test_examples_are_spread_over_the_set():
    """The shown prompts are the same for every method on a set: evenly spread, never more than there are."""
    assert example_indices(10, 4) == [0, 2, 5, 7]
    assert example_indices(2, 8) == [0, 1]
    assert example_indices(5, 0) == []
