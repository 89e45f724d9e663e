"""Logits at single ids of each state, as autograd sees them: rows of the output embedding that are named are read."""

# S states, S1 = S + 1, M ids of all states

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openrlhf_bd.functional.kernels.ragged_dot import ragged_dot_backward, ragged_dot_forward
from openrlhf_bd.functional.linear_logits import LinearLogits


def gather_dot(logits: LinearLogits, ids_M: Tensor, offsets_S1: Tensor) -> Tensor:
    """z_m = scale (<hidden[s(m)], weight[ids_m]> + bias[ids_m]), where s(m) is the state that owns m.

    Args:
        logits: the linear map. Gradient flows to hidden states, weight and bias.
        ids_M: ids, int64.
        offsets_S1: state s owns ids_M[offsets_S1[s]:offsets_S1[s + 1]], int64.

    Returns:
        [M], nats.
    """
    z_M: Tensor = _GatherDot.apply(logits.anchor, logits.hidden_SH, logits, ids_M, offsets_S1)
    return z_M if logits.scale == 1.0 else z_M * logits.scale


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, hidden_SH: Tensor, logits: LinearLogits, ids_M: Tensor, offsets_S1: Tensor
    ) -> Tensor:
        ctx.sink = logits.sink
        ctx.save_for_backward(hidden_SH, logits.weight_VH, ids_M, offsets_S1)
        return ragged_dot_forward(hidden_SH, logits.weight_VH, logits.bias_V, ids_M, offsets_S1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_SH, weight_VH, ids_M, offsets_S1 = ctx.saved_tensors
        needs_anchor, needs_hidden = ctx.needs_input_grad[:2]
        buffers = ctx.sink.buffers() if needs_anchor else [None, None]
        hidden_grad_SH = ragged_dot_backward(grad_outputs[0], hidden_SH, weight_VH, ids_M, offsets_S1, *buffers)
        anchor_grad = grad_outputs[0].new_zeros(()) if needs_anchor else None
        return anchor_grad, hidden_grad_SH.to(hidden_SH.dtype) if needs_hidden else None, None, None, None
