"""Means and confidence intervals by hand."""

import math

import pytest

from openrlhf_bd.evaluation.statistics import estimate, intervals_overlap, paired_difference, t_quantile_95


def test_confidence_interval_by_hand():
    """The interval is mean +- t std / sqrt(n), with the sample standard deviation."""
    # 1 2 3 4 5: mean 3, std sqrt(10 / 4) = 1.5811, t of 4 degrees = 2.7764, half = 2.7764 * 1.5811 / sqrt(5) = 1.9632
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.std == pytest.approx(math.sqrt(2.5))
    assert found.half_width == pytest.approx(1.9632, abs=1e-4)
    assert found.interval == pytest.approx((1.0368, 4.9632), abs=1e-4)


def test_one_value_has_no_spread():
    """A single seed has a mean and neither spread nor interval."""
    found = estimate([7.0])
    assert (found.mean, found.std, found.half_width, found.interval) == (7.0, None, None, (7.0, 7.0))


def test_values_that_are_not_finite_are_left_out():
    """NaN and infinity do not reach the mean; nothing finite gives NaN."""
    assert estimate([math.nan, 1.0, math.inf, 3.0]).mean == 2.0
    assert estimate([math.nan, 1.0, math.inf, 3.0]).num_values == 2
    assert math.isnan(estimate([math.inf]).mean)


@pytest.mark.parametrize(
    ("degrees", "tabled"), [(1, 12.706), (4, 2.776), (11, 2.201), (19, 2.093), (60, 2.000), (10**6, 1.960)]
)
def test_t_quantiles_agree_with_printed_tables(degrees: int, tabled: float):
    """Quantiles of Student's t agree with printed tables to three digits, in the table and in the series."""
    assert t_quantile_95(degrees) == pytest.approx(tabled, abs=6e-4)


def test_overlap_of_intervals():
    """Intervals that share a point overlap; an unknown interval overlaps with nothing."""
    low, middle, high = estimate([1.0, 1.1, 0.9]), estimate([1.2, 1.3, 1.1]), estimate([9.0, 9.1, 8.9])
    assert intervals_overlap(low, middle)
    assert not intervals_overlap(low, high)
    assert not intervals_overlap(low, estimate([1.0]))


def test_paired_difference_by_hand():
    """Each prompt gives the difference of its means over responses; prompts that only one has are left out."""
    # a: 3 - 1 = 2, b: (4 + 6) / 2 - 1 = 4; mean 3. Resampled means of two prompts are 2, 3 or 4.
    one = {"a": [3.0], "b": [4.0, 6.0], "c": [9.0]}
    found = paired_difference(one, {"a": [1.0], "b": [1.0]})
    assert found is not None
    assert (found.mean, found.low, found.high) == (3.0, 2.0, 4.0)
    assert (found.num_prompts, found.num_left_out) == (2, 1)
    assert found.excludes_zero


def test_paired_interval_agrees_with_the_normal_one():
    """Over many prompts the bootstrap interval is mean +- 1.96 std / sqrt(n)."""
    one = {str(i): [float(i % 2)] for i in range(400)}
    found = paired_difference(one, {name: [0.0] for name in one})
    # Half ones: std .5, half width 1.96 * .5 / 20 = .049.
    assert found is not None
    assert found.mean == 0.5
    assert (found.low, found.high) == pytest.approx((0.451, 0.549), abs=0.004)


def test_a_pair_without_a_shared_prompt_has_no_difference():
    """Nothing shared gives nothing; one shared prompt has a difference and no interval."""
    assert paired_difference({"a": [1.0]}, {"b": [1.0]}) is None
    alone = paired_difference({"a": [1.0]}, {"a": [0.5]})
    assert alone is not None
    assert (alone.mean, alone.low, alone.excludes_zero) == (0.5, None, False)
