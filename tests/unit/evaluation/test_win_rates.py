"""Win rates, their interval and p-value, by hand."""

from pathlib import Path

import pytest

from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.win_rates import (
    NO_ANSWER,
    NO_VERDICT,
    NOT_ASKED,
    Counts,
    PairRates,
    Usage,
    WinRates,
    bootstrap_interval,
    pair_rates,
    sign_test,
)

# Scores of the first method: (its answer shown first, shown second).
WIN, LOSS, TIE, SPLIT, LEAN = (1.0, 1.0), (0.0, 0.0), (0.5, 0.5), (1.0, 0.0), (1.0, 0.5)


def test_both_orders_are_averaged_and_ties_count_half() -> None:
    """Two wins, a tie, a verdict that follows the order, and a win with a tie: (1 + 1 + .5 + .5 + .75) / 5 = 0.75."""
    found = pair_rates("a", "b", [WIN, WIN, TIE, SPLIT, LEAN], not_judged={})
    assert found.win_rate == pytest.approx(0.75)
    # Shown first: win, win, tie, win, win. Shown second: win, win, tie, loss, tie.
    assert found.a_first == Counts(wins=4, ties=1, losses=0)
    assert found.b_first == Counts(wins=2, ties=2, losses=1)
    assert found.num_consistent == 3


def test_what_was_not_judged_counts_nowhere() -> None:
    """Prompts without two verdicts are in their number and reasons, and change no rate."""
    found = pair_rates("a", "b", [WIN, LOSS], not_judged={NO_VERDICT: 5, NOT_ASKED: 2, NO_ANSWER: 1})
    assert (found.num_prompts, found.num_judged, found.num_not_judged) == (10, 2, 8)
    assert found.win_rate == 0.5
    # An answer that is no verdict stays one; the other three come with another call.
    assert found.num_missing == 3


def test_nothing_judged_has_no_rate() -> None:
    """Without a judged prompt there is no figure, rather than one half."""
    found = pair_rates("a", "b", [], not_judged={NOT_ASKED: 4})
    assert (found.win_rate, found.interval, found.p_value) == (None, None, None)


def test_interval_of_equal_scores_is_a_point() -> None:
    """Where every prompt has one score every resample has its mean."""
    assert bootstrap_interval([0.75] * 7) == pytest.approx((0.75, 0.75))


def test_interval_is_that_of_the_binomial_it_draws_from() -> None:
    """50 wins and 50 losses: the mean of a resample is Bin(100, 1/2) / 100, whose 2.5 and 97.5 % quantiles are .4, .6.

    P(X <= 39) = 0.0176 and P(X <= 40) = 0.0284, so 40 is the 2.5 % quantile, and 60 by symmetry the other.
    """
    low, high = bootstrap_interval([1.0, 0.0] * 50)
    assert low == pytest.approx(0.4, abs=0.011)
    assert high == pytest.approx(0.6, abs=0.011)


def test_interval_does_not_change_from_call_to_call() -> None:
    """The same scores in another order have the same interval, to the bit."""
    scores = [1.0, 0.5, 0.0, 0.75, 0.25, 1.0]
    assert bootstrap_interval(scores) == bootstrap_interval(scores[::-1])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # Five wins, no loss: 2 (1/2)^5.
        ([1.0] * 5, 2 / 32),
        # Five of six: 2 (1 + 6) / 2^6.
        ([0.75] * 5 + [0.0], 14 / 64),
        # As many wins as losses, and nothing but ties: no evidence.
        ([1.0, 0.0], 1.0),
        ([0.5, 0.5], 1.0),
        # Ties do not count: as five wins.
        ([1.0] * 5 + [0.5] * 90, 2 / 32),
    ],
)
def test_sign_test(scores: list[float], expected: float) -> None:
    """The exact two-sided binomial p-value over prompts that are decided."""
    assert sign_test(scores) == pytest.approx(expected)


def test_sign_test_of_many_prompts() -> None:
    """Thousands of prompts, of which 2^n exceeds a float, have a p-value."""
    assert sign_test([1.0] * 1000 + [0.0] * 1000) == 1.0
    assert 0 <= sign_test([1.0] * 3000) < 1e-300


def rates(*pairs: PairRates) -> WinRates:
    return WinRates(
        model="judge",
        prompt_version=1,
        constrained=False,
        test_set="dolly",
        seed=10,
        top_p=1.0,
        pairs=list(pairs),
        usage=Usage(num_requests=4, prompt_tokens=400, completion_tokens=4),
    )


def test_file_gives_back_what_was_written(tmp_path: Path) -> None:
    """Win rates survive their file."""
    written = rates(pair_rates("a", "b", [WIN, LEAN], not_judged={NOT_ASKED: 1}, num_empty=(0, 1)))
    written.write(tmp_path)
    assert WinRates.read(tmp_path) == written
    assert WinRates.read(tmp_path).num_missing == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "openrlhf-bd judge"), ("{", "no JSON"), ('{"model": "m"}', "Field required")],
)
def test_file_that_is_none_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    """A missing or damaged file is an error with its name and what to do."""
    if content is not None:
        (tmp_path / "win_rates.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as raised:
        WinRates.read(tmp_path)
    assert "win_rates.json" in str(raised.value)
