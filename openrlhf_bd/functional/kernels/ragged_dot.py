"""The ragged gather-dot in the form for the device at hand: Triton kernels on CUDA, blocked torch elsewhere.

Triton is imported at the first call on CUDA; where it is not installed the torch form serves there too, whose sums on
CUDA are atomic and may differ in their last bits from run to run.
"""

# S states, S1 = S + 1, M candidates of all states (ragged), V vocabulary, H hidden size

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from openrlhf_bd.functional.kernels import reference


def ragged_dot_forward(
    hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, ids_M: Tensor, offsets_S1: Tensor
) -> Tensor:
    """Logit of every candidate, [M]: see reference.ragged_dot_forward, whose arguments and result these are."""
    if _has_kernels(hidden_SH.device):
        from openrlhf_bd.functional.kernels import triton_ragged_dot

        return triton_ragged_dot.ragged_dot_forward(hidden_SH, weight_VH, bias_V, ids_M, offsets_S1)
    return reference.ragged_dot_forward(hidden_SH, weight_VH, bias_V, ids_M, offsets_S1)


def ragged_dot_backward(
    grad_M: Tensor,
    hidden_SH: Tensor,
    weight_VH: Tensor,
    ids_M: Tensor,
    offsets_S1: Tensor,
    grad_weight_VH: Tensor | None,
    grad_bias_V: Tensor | None,
) -> Tensor:
    """Gradient of the logits: see reference.ragged_dot_backward, whose arguments and result these are."""
    arguments = (grad_M, hidden_SH, weight_VH, ids_M, offsets_S1, grad_weight_VH, grad_bias_V)
    if _has_kernels(hidden_SH.device):
        from openrlhf_bd.functional.kernels import triton_ragged_dot

        return triton_ragged_dot.ragged_dot_backward(*arguments)
    return reference.ragged_dot_backward(*arguments)


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("triton") is not None
