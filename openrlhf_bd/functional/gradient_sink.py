"""One gradient buffer for an output embedding that many functions of one head read."""

# V vocabulary, H hidden size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GradientSink:
    """Collects the gradients of weight_VH and bias_V, and hands each to autograd once a backward pass.

    Autograd adds up the gradients that several functions return for one tensor, so each of them would hold a [V, H]
    tensor of its own. Here a function takes `anchor()` as a differentiable input in place of the weight; in its
    backward pass it adds to `buffers()` in place and returns a zero for the anchor. Autograd runs the anchor's own
    backward after all of those, and that one returns the buffers.

    The buffers have the types of weight and bias. In half precision a function therefore sums its own contribution in
    float32 and adds it once, so that a buffer is rounded as often as there are functions, not as there are states.
    They are made in the backward pass, of the shapes that weight and bias have now: ZeRO-3 takes the storage of
    parameters away between forward and backward.

    Args:
        weight_VH: output embedding; frozen where it needs no gradient.
        bias_V: its bias, or None; frozen where it needs no gradient.
    """

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None) -> None:
        self._like = [None if x is None or not x.requires_grad else (x.shape, x.dtype) for x in (weight_VH, bias_V)]
        self._device = weight_VH.device
        self._buffers: list[Tensor | None] = [None, None]
        self._graph_task = -1

    def anchor(self, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
        """Scalar 0 that stands for the weight and the bias in the graph. The caller keeps it (no reference cycle)."""
        anchor: Tensor = _Deliver.apply(weight_VH, bias_V, self)
        return anchor

    def buffers(self) -> list[Tensor | None]:
        """[weight's, bias's] gradient so far, to be added to in place within a backward pass; None for a frozen one."""
        # A pass that asked for other gradients only (autograd.grad of the hidden states) may have left sums behind.
        graph_task = torch._C._current_graph_task_id()
        if graph_task != self._graph_task:
            self._graph_task = graph_task
            self._buffers = [x if x is None else torch.zeros(x[0], dtype=x[1], device=self._device) for x in self._like]
        return self._buffers

    def deliver(self) -> list[Tensor | None]:
        """The sums of this backward pass; the sink is empty afterwards."""
        buffers, self._buffers, self._graph_task = self.buffers(), [None, None], -1
        return buffers


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, bias_V: Tensor | None, sink: GradientSink) -> Tensor:
        ctx.sink = sink
        return torch.zeros((), device=weight_VH.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight_grad, bias_grad = ctx.sink.deliver()
        return weight_grad, bias_grad, None
