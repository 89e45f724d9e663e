"""Rouge-L by hand: the longest common subsequence of stemmed words."""

import pytest

from openrlhf_bd.evaluation.rouge import mean_rouge_l, rouge_l


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    """Rouge-L is 200 P R / (P + R) of the longest common subsequence of words."""
    # response "the cat sat" (3 words), reference "the cat was on the mat" (6): LCS "the cat" = 2, P = 2/3, R = 2/6,
    # F = 2 (2/3) (1/3) / (2/3 + 1/3) = 4/9
    assert rouge_l("the cat sat", "the cat was on the mat") == pytest.approx(400 / 9)


def test_order_of_words_counts():
    """Words in another order are no common subsequence."""
    # LCS of "b a" and "a b" is 1 of 2 words: P = R = F = 1/2
    assert rouge_l("b a", "a b") == pytest.approx(50.0)


def test_words_are_stemmed_and_lower_case():
    """Inflected words and capitals match."""
    assert rouge_l("Running DOGS", "runs dog") == 100.0
    # Words of up to three letters are left as they are, so "its" does not become "it".
    assert rouge_l("its", "it") == 0.0


def test_the_best_reference_counts():
    """With several references the score is the best one's, whatever their order."""
    references = ["nothing alike", "one two", "one two three four"]
    # against "one two": P = 2/3, R = 1, F = 4/5;  against "one two three four": P = 1, R = 3/4, F = 6/7
    assert rouge_l("one two three", references) == pytest.approx(600 / 7)
    assert rouge_l("one two three", references[::-1]) == pytest.approx(600 / 7)


@pytest.mark.parametrize("response", ["", "+ - *", "。"])
def test_a_response_without_words_scores_zero(response: str):
    """An empty response, or one without letters and digits, scores 0 and raises nothing."""
    assert rouge_l(response, "one two") == 0.0


def test_mean_over_a_set():
    """The score of a set is the mean of its responses."""
    # 100 and 50
    assert mean_rouge_l(["a b", "b a"], ["a b", ["a b"]]) == pytest.approx(75.0)


def test_nothing_to_compare_is_an_error():
    """No reference, or no response, is an error and not a score."""
    with pytest.raises(ValueError, match="no reference"):
        rouge_l("a", [])
    with pytest.raises(ValueError, match="no response"):
        mean_rouge_l([], [])
