"""Sums along responses, over flat states that name the one that follows: by doubling, in log2 S steps for all rows."""

# S states

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def later_sums(x_S: Tensor, factor_S: Tensor, next_S: Tensor) -> Tensor:
    """What lies behind each state: y_t = factor_{t+1} (x_{t+1} + y_{t+1}). No gradient flows.

    With factors of 1 the sum of all later x of the response; with ratios of two policies each later x has the product
    of the ratios from t + 1 on.

    Args:
        x_S: values of the states.
        factor_S: factors of the states.
        next_S: index of the state that follows, -1 where none does.

    Returns:
        [S]; 0 where nothing follows.
    """
    follows_S, next_S = next_S >= 0, next_S.clamp(min=0)
    # y = offset + slope y[next]; a step replaces next by the state twice as far away.
    offset_S = torch.where(follows_S, (factor_S * x_S)[next_S], 0.0)
    slope_S = torch.where(follows_S, factor_S[next_S], 0.0)
    for _ in range(len(x_S).bit_length()):
        offset_S = offset_S + slope_S * offset_S[next_S]
        slope_S = slope_S * slope_S[next_S]
        next_S = next_S[next_S]
    return offset_S


@torch.no_grad()
def earlier_sums(x_S: Tensor, next_S: Tensor) -> Tensor:
    """Sum of x over all earlier states of the response, [S]; 0 at its first. No gradient flows.

    Args:
        x_S: values of the states.
        next_S: index of the state that follows, -1 where none does.
    """
    follows_S = next_S >= 0
    before_S = torch.full_like(next_S, -1)
    before_S[next_S[follows_S]] = torch.nonzero(follows_S)[:, 0]
    return later_sums(x_S, torch.ones_like(x_S), before_S)
