"""Reductions over ragged segments: M values, each with the index of the segment that it belongs to.

No function gives NaN, in value or gradient, for values of -inf or for a segment without values.
"""

# M values, G segments

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(x_M: Tensor, segment_M: Tensor, num_segments: int) -> Tensor:
    """Sum of each segment.

    Args:
        x_M: values. Gradient flows.
        segment_M: segment of each value, int64, in [0, num_segments), in any order.
        num_segments: G.

    Returns:
        [G]; 0 where a segment has no value.
    """
    return x_M.new_zeros(num_segments).index_add(0, segment_M, x_M)


def segment_max(x_M: Tensor, segment_M: Tensor, num_segments: int, *, initial: float) -> Tensor:
    """Maximum of each segment and `initial`. No gradient flows.

    Args:
        x_M: values.
        segment_M: segment of each value, int64, in [0, num_segments).
        num_segments: G.
        initial: result where a segment has no greater value (a whole number if x_M holds integers).

    Returns:
        [G], type of x_M.
    """
    start_G = torch.full((num_segments,), initial, dtype=x_M.dtype, device=x_M.device)
    return start_G.scatter_reduce(0, segment_M, x_M.detach(), "amax", include_self=True)


def segment_argmax(x_M: Tensor, segment_M: Tensor, num_segments: int) -> Tensor:
    """Position in x_M of each segment's maximum, the last one where several are equal. No gradient flows.

    Args:
        x_M: values.
        segment_M: segment of each value, int64, in [0, num_segments).
        num_segments: G.

    Returns:
        [G] int64 positions in [0, M); -1 where a segment has no value.
    """
    max_G = segment_max(x_M, segment_M, num_segments, initial=float("-inf"))
    position_M = torch.arange(len(x_M), device=x_M.device)
    position_M = torch.where(x_M.detach() == max_G[segment_M], position_M, -1)
    return segment_max(position_M, segment_M, num_segments, initial=-1)


def segment_logsumexp(x_M: Tensor, segment_M: Tensor, num_segments: int) -> Tensor:
    """log sum exp of each segment.

    Args:
        x_M: values, nats. Gradient flows: softmax within the segment.
        segment_M: segment of each value, int64, in [0, num_segments).
        num_segments: G.

    Returns:
        [G], nats; -inf, with zero gradient, where a segment has no value above -inf.
    """
    max_G = segment_max(x_M, segment_M, num_segments, initial=float("-inf"))
    max_G = torch.where(max_G == float("-inf"), 0.0, max_G)
    sum_G = segment_sum(torch.exp(x_M - max_G[segment_M]), segment_M, num_segments)
    empty_G = sum_G == 0
    # log is taken of 1 where nothing is there: a log of 0 that is thrown away would still put NaN into the gradient.
    return torch.where(empty_G, float("-inf"), torch.log(torch.where(empty_G, 1.0, sum_G)) + max_G)


def segment_cumsum_before(x_M: Tensor, offsets_G1: Tensor, segment_M: Tensor) -> Tensor:
    """Sum of the values that come before each value in its segment. No gradient is promised.

    Args:
        x_M: values, grouped by segment; float64, since sums run over all segments before differences are taken.
        offsets_G1: segment g owns x_M[offsets_G1[g]:offsets_G1[g + 1]].
        segment_M: segment of each value, non-decreasing.

    Returns:
        [M].
    """
    before_M1 = torch.cat([x_M.new_zeros(1), torch.cumsum(x_M, 0)])
    return before_M1[:-1] - before_M1[offsets_G1[:-1]][segment_M]
