"""Metrics that reduce exactly over micro-batches and ranks: each is a sum and a weight, and its value sum / weight."""

# S states

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]
SECOND_MOMENT = "_second_moment"
SPREAD = "_spread"
AT_MOST = "_at_most_"
BOUNDS = tuple(2**power for power in range(19))  # 1, 2, 4, ... 262,144: more than any vocabulary
QUANTILES = (0.5, 0.9, 0.99)


def weighted(x_S: Tensor, weight_S: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of weight * x and of the weights, float64 scalars without gradient; x where the weight is 0 never counts.

    Args:
        x_S: values; bool or any float type.
        weight_S: weights >= 0; bool or any float type.
    """
    with torch.no_grad():
        weight_S = weight_S.double()
        return torch.where(weight_S > 0, weight_S * x_S.double(), 0.0).sum(), weight_S.sum()


def at_most(name: str, count_S: Tensor, weight_S: Tensor) -> Metrics:
    """Weighted shares of the counts that are at most 1, 2, 4, ..., from which mean_metrics makes quantiles.

    Args:
        name: of the metric.
        count_S: counts, int64, >= 1.
        weight_S: weights >= 0; bool or any float type.
    """
    with torch.no_grad():
        weight_S = weight_S.double()
        bounds = torch.tensor(BOUNDS, device=count_S.device)
        in_bin = torch.zeros(len(BOUNDS) + 1, dtype=torch.float64, device=count_S.device)
        in_bin.index_add_(0, torch.bucketize(count_S, bounds), weight_S)
        # Not cumsum: deterministic algorithms (--train.full_determinism_enable) refuse that of floats on CUDA.
        up_to = in_bin.new_ones(len(in_bin), len(in_bin)).tril()
        totals, weight = (up_to * in_bin).sum(dim=1), weight_S.sum()
        return {f"{name}{AT_MOST}{bound}": (totals[index], weight) for index, bound in enumerate(BOUNDS)}


def merge_metrics(parts: Iterable[Metrics]) -> Metrics:
    """Add sums and weights of the same name."""
    merged: Metrics = {}
    for part in parts:
        for name, (total, weight) in part.items():
            old_total, old_weight = merged.get(name, (0.0, 0.0))
            merged[name] = (old_total + total, old_weight + weight)
    return merged


def mean_metrics(metrics: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Values of reduced metrics: sum / weight, and a spread (standard deviation) for each second moment.

    `x` and `x_second_moment` become `x` and `x_spread`. `x_at_most_1`, `_2`, `_4`, ... become `x_p50`, `x_p90` and
    `x_p99`: the first of these bounds that holds such a share. A metric without weight is left out: there was nothing
    to measure.
    """
    values = {name: float(total) / float(weight) for name, (total, weight) in metrics.items() if float(weight) != 0.0}
    for name in [name for name in values if name.endswith(SECOND_MOMENT)]:
        base = name.removesuffix(SECOND_MOMENT)
        values[base + SPREAD] = math.sqrt(max(0.0, values.pop(name) - values[base] ** 2))
    shares: dict[str, dict[int, float]] = {}
    for name in [name for name in values if AT_MOST in name]:
        base, _, bound = name.partition(AT_MOST)
        shares.setdefault(base, {})[int(bound)] = values.pop(name)
    for base, share in shares.items():
        for quantile in QUANTILES:
            values[f"{base}_p{100 * quantile:.0f}"] = float(_first_bound(share, quantile))
    return values


def _first_bound(share: Mapping[int, float], quantile: float) -> int:
    # Sums over ranks may leave a whole share a rounding error below 1.
    return min((bound for bound in share if share[bound] >= quantile - 1e-9), default=max(share))
