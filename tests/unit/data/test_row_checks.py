"""Rows that a student must not compute with are refused by name, with the place in them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_bd.data.row_checks import check_always_included, check_sets_belong, check_vocabulary
from openrlhf_bd.errors import DataError
from openrlhf_bd.records import RecordedSets, Rollout


def row(row_id: str = "a:0", **changes: Any) -> Rollout:
    """Two states. At the first the teacher gives .6, .3, .1 to the ids 4, 5, 6, at the second .9, .1 to 7, 4; p = .8.

    Response 5, 7: both in their sets {4, 5} of mass .9 and {7} of mass .9.
    """
    values = {
        "row_id": row_id,
        "prompt_ids": np.array([2, 3], np.int32),
        "response_ids": np.array([5, 7], np.int32),
        "finish_reason": "stop",
        "logprobs_T": np.log(np.array([0.3, 0.9], np.float32)),
        "sets": RecordedSets(
            np.array([4, 5, 7], np.int32),
            np.array([0, 2, 3], np.int64),
            -np.log(np.array([0.9, 0.9], np.float32)),
            np.log(np.array([0.6, 0.3, 0.9], np.float32)).astype(np.float16).astype(np.float32),
        ),
    }
    return Rollout(**{**values, **changes})


def with_sets(rollout: Rollout, **changes: Any) -> Rollout:
    assert rollout.sets is not None
    return replace(rollout, sets=replace(rollout.sets, **changes))


class TestVocabulary:
    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (row("b:1", prompt_ids=np.array([2, 8], np.int32)), "row b:1, prompt token 1: id 8"),
            (row("b:1", response_ids=np.array([9, 7], np.int32)), "row b:1, response token 0: id 9"),
            (
                with_sets(row("b:1"), ids_M=np.array([4, 5, 30], np.int32)),
                "row b:1, candidate set of response token 1: id 30",
            ),
            (row("b:1", prompt_ids=np.array([-1, 2], np.int32)), "row b:1, prompt token 0: id -1"),
            (
                with_sets(row("b:1"), ids_M=np.array([4, -5, 7], np.int32)),
                "row b:1, candidate set of response token 0: id -5",
            ),
        ],
    )
    def test_row_is_named(self, bad: Rollout, message: str) -> None:
        """An id without a logit names the row among others, the place in it, and what ids there are."""
        with pytest.raises(DataError, match=f"^{message} is outside the student's vocabulary, expected 0 to 7;"):
            check_vocabulary([row(), bad], {}, vocab_size=8)

    def test_block_is_named(self) -> None:
        """Pre-training text of another tokenizer names the block and the token."""
        with pytest.raises(DataError, match=r"^pre-training block 3 token 2: id 8"):
            check_vocabulary([row()], {"pre-training block 3": np.array([1, 2, 8])}, vocab_size=8)

    def test_ids_of_the_vocabulary_pass(self) -> None:
        """The largest id of the vocabulary is fine."""
        check_vocabulary([row(), row("b:1", sets=None)], {"block": np.array([0, 7])}, vocab_size=8)


class TestSetsBelong:
    def test_recorded_rows_pass(self) -> None:
        """Tokens inside their sets, outside them, a bootstrap state, sets without log-probabilities, sets of p = 1."""
        outside = row("b:0", response_ids=np.array([6, 7], np.int32), logprobs_T=np.log(np.float32([0.1, 0.9])))
        cut = row("c:0", response_ids=np.array([5], np.int32), logprobs_T=np.log(np.float32([0.3])))
        whole = RecordedSets(np.empty(0, np.int32), np.zeros(3, np.int64), np.zeros(2, np.float32), None)
        check_sets_belong([row(), outside, replace(cut, finish_reason="length"), row("d:0", sets=None)])
        check_sets_belong([with_sets(row(), logprobs_M=None), with_sets(outside, logprobs_M=None)])
        check_sets_belong([row("e:0", sets=whole), row("f:0", logprobs_T=None)])
        check_sets_belong([])

    @pytest.mark.parametrize("logprobs", [True, False], ids=["log-probabilities", "ids alone"])
    def test_likely_token_outside_its_set(self, logprobs: bool) -> None:
        """A token of probability .9 cannot lie outside a set of mass .9, which leaves .1."""
        bad = with_sets(row("b:1"), ids_M=np.array([4, 5, 6], np.int32))
        bad = bad if logprobs else with_sets(bad, logprobs_M=None)
        others = [row() if logprobs else with_sets(row(), logprobs_M=None)]
        with pytest.raises(DataError, match=r"^row b:1: .* response token 1 \(id 7\) .* not in its candidate set"):
            check_sets_belong([*others, bad])

    def test_candidate_with_another_log_probability(self) -> None:
        """A token whose candidate has another log-probability (.6, recorded .3) is one of other sets."""
        bad = with_sets(row("b:1"), ids_M=np.array([5, 4, 7], np.int32))
        with pytest.raises(DataError, match=r"^row b:1: .* response token 0 \(id 5\) .* with another one"):
            check_sets_belong([bad, row()])

    def test_token_more_likely_than_its_set(self) -> None:
        """Without candidates' log-probabilities a token of .9 in a set of mass .5 is refused all the same."""
        bad = with_sets(row("b:1"), neg_log_mass_S=-np.log(np.float32([0.9, 0.5])), logprobs_M=None)
        with pytest.raises(DataError, match=r"^row b:1: .* response token 1 \(id 7\)"):
            check_sets_belong([bad])

    @settings(deadline=None, max_examples=100)
    @given(seed=st.integers(0, 10_000), top_p=st.sampled_from([0.5, 0.8, 0.95, 0.999]), scale=st.floats(0.1, 12.0))
    def test_rows_as_a_store_gives_them_back_pass(self, seed: int, top_p: float, scale: float) -> None:
        """Sets of random teachers, flat and confident, rounded to float16 as in a store, are never refused."""
        check_sets_belong([random_row(np.random.default_rng(seed), top_p, scale)])

    def test_exchanged_sets_are_found(self) -> None:
        """Sets of one row under the tokens of another are refused: 100 of 100 pairs of 20 tokens."""
        found = 0
        for seed in range(100):
            random = np.random.default_rng(seed)
            first, second = (random_row(random, 0.95, 4.0) for _ in range(2))
            try:
                check_sets_belong([replace(first, sets=second.sets)])
            except DataError:
                found += 1
        assert found == 100


def random_row(random: np.random.Generator, top_p: float, scale: float) -> Rollout:
    """Twenty sampled tokens over 50 ids with top-p sets worked out state by state, as a store would return them."""
    ids, offsets, masses, logprobs, taken, taken_logprobs = [], [0], [], [], [], []
    for _ in range(20):
        logits = scale * random.standard_normal(50)
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        order = np.argsort(-probability)
        before = np.cumsum(probability[order]) - probability[order]
        chosen = order[before < top_p]
        token = random.choice(50, p=probability)
        ids += chosen.tolist()
        offsets.append(len(ids))
        masses.append(-np.log(min(1.0, probability[chosen].sum())))
        logprobs += np.log(probability[chosen]).tolist()
        taken.append(token)
        taken_logprobs.append(np.log(probability[token]))
    half = np.float16
    return Rollout(
        row_id="r:0",
        prompt_ids=np.array([1], np.int32),
        response_ids=np.array(taken, np.int32),
        finish_reason="stop",
        logprobs_T=np.array(taken_logprobs, np.float32),
        sets=RecordedSets(
            np.array(ids, np.int32),
            np.array(offsets, np.int64),
            np.array(masses).astype(half).astype(np.float32),
            np.array(logprobs).astype(half).astype(np.float32),
        ),
    )


class TestAlwaysIncluded:
    def test_row_is_named(self) -> None:
        """A set without an id that every set must have names the row and the state."""
        with pytest.raises(DataError, match=r"^row b:1: the candidate set of response token 0 lacks id 7"):
            check_always_included([row("b:1")], [7])

    def test_ids_in_every_set_pass(self) -> None:
        """Rows whose every set has the id, and rows without sets, pass."""
        ends = with_sets(row(), ids_M=np.array([4, 7, 7], np.int32))
        check_always_included([ends, row("b:1", sets=None)], [7])
