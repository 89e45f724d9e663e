"""Mean, spread and confidence interval of a score over seeds. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
