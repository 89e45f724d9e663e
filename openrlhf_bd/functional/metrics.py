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


def weighted(x_S: Tensor, weight_S: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of weight * x and of the weights, float64 scalars without gradient; x where the weight is 0 never counts.

    Args:
        x_S: values; bool or any float type.
        weight_S: weights >= 0; bool or any float type.
    """
    with torch.no_grad():
        weight_S = weight_S.double()
        return torch.where(weight_S > 0, weight_S * x_S.double(), 0.0).sum(), weight_S.sum()


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

    `x` and `x_second_moment` become `x` and `x_spread`. A metric without weight is left out: there was nothing to
    measure.
    """
    values = {name: float(total) / float(weight) for name, (total, weight) in metrics.items() if float(weight) != 0.0}
    for name in [name for name in values if name.endswith(SECOND_MOMENT)]:
        base = name.removesuffix(SECOND_MOMENT)
        values[base + SPREAD] = math.sqrt(max(0.0, values.pop(name) - values[base] ** 2))
    return values
