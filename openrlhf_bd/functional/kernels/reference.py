"""Ragged gather-dot in torch: the CPU path, and what the Triton kernels are tested against.

Gathered rows are held a block at a time: a block stays in the cache of a CPU, and memory does not grow with M.
"""

# S states, S1 = S + 1, M candidates of all states (ragged), V vocabulary, H hidden size,
# C candidates of a block, U different tokens of a block

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_BLOCK_ELEMENTS = 1 << 18  # gathered elements at once: 1 MiB of float32, about the cache of a core
DEVICE_BLOCK_ELEMENTS = 1 << 24  # elsewhere a block amortises its launches instead


@torch.no_grad()
def ragged_dot_forward(
    hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, ids_M: Tensor, offsets_S1: Tensor
) -> Tensor:
    """Logit of every candidate.

    z_m = <hidden[s(m)], weight[ids_m]> + bias[ids_m], where s(m) is the state that owns candidate m.

    Args:
        hidden_SH: hidden state of each state, any float type. No gradient flows (see ragged_dot_backward).
        weight_VH: output embedding, any float type.
        bias_V: its bias, or None.
        ids_M: candidate token ids, int64, in [0, V).
        offsets_S1: state s owns ids_M[offsets_S1[s]:offsets_S1[s + 1]], int64.

    Returns:
        [M], float32; float64 if an operand is float64.
    """
    dtype = accumulation_type(hidden_SH, weight_VH)
    state_M = candidate_states(offsets_S1, len(ids_M))
    z_M = torch.empty(len(ids_M), dtype=dtype, device=ids_M.device)
    for block in _blocks(len(ids_M), hidden_SH):
        rows_CH = weight_VH.index_select(0, ids_M[block]).to(dtype)
        z_M[block] = rows_CH.mul_(hidden_SH.index_select(0, state_M[block])).sum(dim=1)
    return z_M if bias_V is None else z_M.add_(bias_V[ids_M])


@torch.no_grad()
def ragged_dot_backward(
    grad_M: Tensor,
    hidden_SH: Tensor,
    weight_VH: Tensor,
    ids_M: Tensor,
    offsets_S1: Tensor,
    grad_weight_VH: Tensor | None,
    grad_bias_V: Tensor | None,
) -> Tensor:
    """Gradient of the logits of ragged_dot_forward.

    grad_hidden[s] = sum over m of s: grad_m weight[ids_m];  grad_weight[v] += sum over m with ids_m = v:
    grad_m hidden[s(m)];  grad_bias[v] += sum over the same m: grad_m.

    Args:
        grad_M: gradient of each logit.
        hidden_SH, weight_VH, ids_M, offsets_S1: as in the forward pass.
        grad_weight_VH: buffer to add to, any float type, or None: not wanted. Sums are in the type of the result and
            rounded to the buffer's once a token and block.
        grad_bias_V: the same for the bias.

    Returns:
        grad_hidden_SH, [S, H], float32 (float64 if an operand is float64); 0 where a state has no candidate.
    """
    dtype = accumulation_type(hidden_SH, weight_VH)
    state_M = candidate_states(offsets_S1, len(ids_M))
    grad_hidden_SH = torch.zeros(hidden_SH.shape, dtype=dtype, device=hidden_SH.device)
    for block in _blocks(len(ids_M), hidden_SH):
        rows_CH = weight_VH.index_select(0, ids_M[block]).to(dtype).mul_(grad_M[block, None])
        grad_hidden_SH.index_add_(0, state_M[block], rows_CH)
    if grad_weight_VH is not None or grad_bias_V is not None:
        _add_token_gradients(grad_M.to(dtype), hidden_SH, ids_M, state_M, grad_weight_VH, grad_bias_V)
    return grad_hidden_SH


def accumulation_type(*operands: Tensor) -> torch.dtype:
    """Type in which products are summed: float32, or float64 where an operand is float64."""
    return torch.float64 if any(operand.dtype == torch.float64 for operand in operands) else torch.float32


def candidate_states(offsets_S1: Tensor, num_candidates: int) -> Tensor:
    """State of each candidate, [M] int64, non-decreasing."""
    states_S = torch.arange(len(offsets_S1) - 1, device=offsets_S1.device)
    return torch.repeat_interleave(states_S, offsets_S1.diff(), output_size=num_candidates)


def _add_token_gradients(
    grad_M: Tensor,
    hidden_SH: Tensor,
    ids_M: Tensor,
    state_M: Tensor,
    grad_weight_VH: Tensor | None,
    grad_bias_V: Tensor | None,
) -> None:
    # Sorted by token, a block is summed before it is added: a buffer of half precision is not rounded per candidate.
    sorted_M, order_M = torch.sort(ids_M, stable=True)
    for block in _blocks(len(ids_M), hidden_SH):
        grad_C = grad_M[order_M[block]]
        token_U, segment_C = torch.unique_consecutive(sorted_M[block], return_inverse=True)
        if grad_weight_VH is not None:
            rows_CH = hidden_SH.index_select(0, state_M[order_M[block]]).to(grad_M.dtype).mul_(grad_C[:, None])
            sum_UH = rows_CH.new_zeros(len(token_U), rows_CH.shape[1]).index_add_(0, segment_C, rows_CH)
            grad_weight_VH.index_add_(0, token_U, sum_UH.to(grad_weight_VH.dtype))
        if grad_bias_V is not None:
            sum_U = grad_C.new_zeros(len(token_U)).index_add_(0, segment_C, grad_C)
            grad_bias_V.index_add_(0, token_U, sum_U.to(grad_bias_V.dtype))


def _blocks(num_candidates: int, hidden_SH: Tensor) -> Iterator[slice]:
    elements = CPU_BLOCK_ELEMENTS if hidden_SH.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    rows = max(1, elements // hidden_SH.shape[1])
    return (slice(start, min(start + rows, num_candidates)) for start in range(0, num_candidates, rows))
