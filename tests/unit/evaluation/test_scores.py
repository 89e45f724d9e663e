"""Scores of a set of responses, worked out by hand."""

import math

import numpy as np
import pytest

from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.scores import Response, distinct, mean_nll, references_of, score_seed
from openrlhf_bd.records import Prompt


def prompt_with(record: dict[str, object]) -> Prompt:
    return Prompt("data:3", np.array([1, 2], dtype=np.int32), record)


def test_distinct_counts_ngrams_over_the_whole_set():
    """distinct-n is different n-grams over all n-grams of the set, not a mean over responses."""
    # words: a b a | A c -> 5 words, 3 different;  pairs: ab ba | ac -> 3 of 3
    assert distinct(["a b a", "A c"], 1) == pytest.approx(3 / 5)
    assert distinct(["a b a", "A c"], 2) == 1.0
    assert distinct(["a", ""], 2) == 0.0


def test_nll_is_a_mean_over_tokens():
    """Long responses weigh more: the mean is over tokens, not over responses."""
    # (1 + 1 + 1 + 5) / 4 = 2, and not (1 + 5) / 2
    assert mean_nll([np.full(3, -1.0, np.float32), np.full(1, -5.0, np.float32)]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no token"):
        mean_nll([np.zeros(0, np.float32)])


def test_impossible_token_makes_the_nll_infinite():
    """A token that the teacher holds impossible shows as infinity; nothing is hidden or raised."""
    assert mean_nll([np.array([-1.0, -np.inf], np.float32)]) == math.inf


def test_score_seed_by_hand():
    """Every score of one seed, by hand."""
    responses = [Response("a b", 4, "stop"), Response("b a", 2, "length")]
    records = [{"answer": "a b"}, {"answer": "a b"}]
    scores = score_seed(responses, records, [["a b"], ["a b"]], lambda record, text: record["answer"] == text)
    assert scores.rouge_l_B == pytest.approx([100.0, 50.0])
    assert scores.rouge_l == pytest.approx(75.0)
    assert scores.correct_B == [True, False]
    assert scores.accuracy == 0.5
    assert scores.response_tokens == 3.0
    assert scores.stop_rate == 0.5
    assert scores.distinct_1 == 0.5  # a b b a: 2 of 4
    assert scores.distinct_2 == 1.0  # ab, ba


def test_what_cannot_be_measured_is_none():
    """Without references there is no Rouge-L, without a checker no accuracy."""
    scores = score_seed([Response("a", 1, "stop")], [{}], None, None)
    assert scores.rouge_l is None
    assert scores.accuracy is None


def test_the_best_of_any_number_of_references_counts():
    """Rouge-L is the best over a prompt's references; a prompt without one has none and does not count in the mean."""
    responses = [Response("a b", 2, "stop"), Response("c", 1, "stop"), Response("d", 1, "stop")]
    scores = score_seed(responses, [{}] * 3, [["z", "b a", "a b"], [], ["z"]], None)
    assert scores.rouge_l_B == [100.0, None, 0.0]
    assert scores.rouge_l == 50.0  # (100 + 0) / 2
    assert score_seed(responses[:1], [{}], [[]], None).rouge_l is None


def test_references_are_a_text_or_a_list():
    """One reference or several are both taken as they stand in the record; a record may have none."""
    assert references_of(prompt_with({"output": "x"}), "output") == ["x"]
    assert references_of(prompt_with({"output": ["x", "y"]}), "output") == ["x", "y"]
    assert references_of(prompt_with({"output": None}), "output") == []


@pytest.mark.parametrize("record", [{"output": 3}, {"output": ["x", None]}, {"output": ["x", ""]}])
def test_a_wrong_reference_names_prompt_and_key(record: dict[str, object]):
    """A reference that is no text is an error that names the prompt, the key and the option."""
    with pytest.raises(DataError, match=r"data:3.*\"output\".*--data.label_key"):
        references_of(prompt_with(record), "output")
