import math

import torch

from openrlhf_bd.functional.segments import (
    segment_argmax,
    segment_cumsum_before,
    segment_logsumexp,
    segment_max,
    segment_sum,
)

INF = float("inf")
SEGMENT = torch.tensor([0, 0, 2, 2, 2])


def test_logsumexp_of_known_values() -> None:
    """log sum exp of each segment, -inf where it is empty."""
    x = torch.log(torch.tensor([1.0, 2.0, 4.0, 4.0, 8.0], dtype=torch.float64))
    # log(1 + 2), nothing, log(4 + 4 + 8)
    expected = torch.tensor([math.log(3), -INF, math.log(16)], dtype=torch.float64)
    torch.testing.assert_close(segment_logsumexp(x, SEGMENT, 3), expected)


def test_logsumexp_neither_overflows_nor_underflows() -> None:
    """Levels of 1e4 nats shift the result by as much."""
    x = torch.tensor([1e4, 1e4, -1e4, -1e4, -1e4], dtype=torch.float64)
    expected = torch.tensor([1e4 + math.log(2), -INF, -1e4 + math.log(3)], dtype=torch.float64)
    torch.testing.assert_close(segment_logsumexp(x, SEGMENT, 3), expected, rtol=0, atol=1e-11)


def test_logsumexp_gradient_is_softmax_and_never_nan() -> None:
    """-inf values, segments of only -inf and empty segments give zero gradient, not NaN."""
    x = torch.tensor([0.0, math.log(3), -INF, -INF, -INF], dtype=torch.float64, requires_grad=True)
    value = segment_logsumexp(x, SEGMENT, 3)
    value[torch.isfinite(value)].sum().backward()
    # softmax(0, log 3) = 1/4, 3/4
    torch.testing.assert_close(x.grad, torch.tensor([0.25, 0.75, 0.0, 0.0, 0.0], dtype=torch.float64))
    x.grad = None
    segment_logsumexp(x, SEGMENT, 3).sum().backward()
    assert x.grad is not None
    assert not x.grad.isnan().any()


def test_logsumexp_passes_gradcheck() -> None:
    """The gradient agrees with finite differences."""
    x = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: segment_logsumexp(v, torch.tensor([1, 0, 1, 1, 0]), 2), (x,))


def test_sum_max_argmax() -> None:
    """Sums, maxima and positions of maxima of known segments; defaults where a segment is empty."""
    x = torch.tensor([3.0, 5.0, -1.0, -1.0, -2.0])
    assert segment_sum(x, SEGMENT, 3).tolist() == [8.0, 0.0, -4.0]
    assert segment_max(x, SEGMENT, 3, initial=-INF).tolist() == [5.0, -INF, -1.0]
    # Positions 2 and 3 are equal: the last one is given.
    assert segment_argmax(x, SEGMENT, 3).tolist() == [1, -1, 3]


def test_cumsum_before_restarts_at_each_segment() -> None:
    """Only values of the same segment count."""
    x = torch.tensor([0.5, 0.25, 0.5, 0.125, 0.25], dtype=torch.float64)
    before = segment_cumsum_before(x, torch.tensor([0, 2, 2, 5]), SEGMENT)
    assert before.tolist() == [0.0, 0.5, 0.0, 0.5, 0.625]
