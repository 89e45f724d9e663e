"""Spread and confidence interval of a score over seeds, and paired differences over prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom; above, a series is exact to four digits.
_T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_Z_95 = 1.959964


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score over seeds.

    Attributes:
        mean: mean over the finite values; NaN if there is none.
        std: sample standard deviation (n - 1); None with fewer than two values.
        half_width: half of the 95 % confidence interval of the mean; None with fewer than two values.
        num_values: finite values.
        values: all values as given.
    """

    mean: float
    std: float | None
    half_width: float | None
    num_values: int
    values: tuple[float, ...]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval; the mean itself where it is unknown."""
        half = self.half_width or 0.0
        return self.mean - half, self.mean + half


def t_quantile_95(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t distribution.

    Above 10 degrees of freedom: the Cornish-Fisher series in 1 / degrees (Abramowitz and Stegun 26.7.5).

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"t_quantile_95: found {degrees} degrees of freedom, expected at least 1")
    if degrees <= len(_T_95):
        return _T_95[degrees - 1]
    z = _Z_95
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, sample standard deviation and 95 % confidence interval of the mean: mean +- t_{n-1} std / sqrt(n).

    Values that are not finite are left out of all three.
    """
    finite = [value for value in values if math.isfinite(value)]
    n = len(finite)
    if n == 0:
        return Estimate(math.nan, None, None, 0, tuple(values))
    mean = math.fsum(finite) / n
    if n == 1:
        return Estimate(mean, None, None, 1, tuple(values))
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (n - 1))
    return Estimate(mean, std, t_quantile_95(n - 1) * std / math.sqrt(n), n, tuple(values))


def intervals_overlap(one: Estimate, other: Estimate) -> bool:
    """Whether the 95 % intervals of two scores overlap; False where either is unknown."""
    if one.half_width is None or other.half_width is None:
        return False
    return one.interval[0] <= other.interval[1] and other.interval[0] <= one.interval[1]


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """A score of one method minus that of another, over the prompts that both answered.

    Attributes:
        mean: mean over prompts of the difference of their means over responses.
        low, high: 95 % percentile interval of the bootstrap over prompts; None with fewer than two prompts.
        num_prompts: prompts that both have.
        num_left_out: prompts that only one of the two has.
    """

    mean: float
    low: float | None
    high: float | None
    num_prompts: int
    num_left_out: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def paired_difference(
    one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]], *, num_resamples: int = 4000
) -> PairedDifference | None:
    """Difference of two methods over the same prompts, with a bootstrap interval over prompts.

    mean_i (mean_s one[i, s] - mean_s other[i, s]) over prompts i and responses s. Pairing takes out what makes a prompt
    easy or hard for both; the interval says how much other prompts would change, not another training seed.

    Args:
        one, other: scores of the responses by prompt.
        num_resamples: draws of as many prompts, with replacement; the same draws for every call.

    Returns:
        None where no prompt was answered by both.
    """
    shared = sorted(prompt for prompt in one.keys() & other.keys() if one[prompt] and other[prompt])
    if not shared:
        return None
    difference_P = np.array([math.fsum(one[p]) / len(one[p]) - math.fsum(other[p]) / len(other[p]) for p in shared])
    num_prompts = len(shared)
    low = high = None
    if num_prompts > 1:
        draws = np.random.default_rng(0).multinomial(
            num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_resamples
        )
        low, high = (float(bound) for bound in np.quantile(draws @ difference_P / num_prompts, (0.025, 0.975)))
    left_out = len(one.keys() | other.keys()) - num_prompts
    return PairedDifference(float(difference_P.mean()), low, high, num_prompts, left_out)
