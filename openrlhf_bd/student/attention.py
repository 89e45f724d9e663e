"""Attention of packed rows that never crosses rows and never builds an [L, L] mask.

transformers tells packed rows apart by position ids that restart, and with its own "sdpa" makes a block mask of the
whole sequence: every row is multiplied with every other one and the products are thrown away. Here each row is
attended to by itself: on CUDA by one variable-length flash kernel that PyTorch brings, elsewhere row by row.

Importing this module makes the implementation known to transformers under the name PER_ROW_SDPA.
"""

# B sequences, L positions of a sequence, R rows packed into it, A attention heads, G key and value heads, D head size

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PER_ROW_SDPA = "per_row_sdpa"
# What flash kernels compute: sizes and types.
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_MAX_HEAD_SIZE = 256


def rows_of_pack(position_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
    """Where the rows of a packed sequence lie, as keyword arguments of a transformers model's forward pass.

    The model hands them on to the attention of each layer: `row_lengths` to this module's, the others to flash
    attention, which would otherwise find them out again in each layer.

    Args:
        position_ids: position of each token in its own row, [B, L]; 0 where a further row starts.
        attention_mask: mask of padding, or None.

    Returns:
        No argument for padded rows: where there are several sequences, or a mask.
    """
    if len(position_ids) > 1 or attention_mask is not None:
        return {}
    bounds = [0, *(1 + (position_ids[0, 1:] == 0).nonzero().flatten()).tolist(), position_ids.shape[1]]
    lengths = tuple(end - start for start, end in pairwise(bounds))
    offsets = torch.tensor(bounds, dtype=torch.int32, device=position_ids.device)
    return {
        "row_lengths": lengths,
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def per_row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_lengths: tuple[int, ...] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row; the signature is that of transformers' attention functions.

    Args:
        module: attention layer.
        query: [B, A, L, D].
        key: [B, G, L, D]; A is a multiple of G.
        value: like key.
        attention_mask: [B, 1, L, L] for padded rows; None where the rows of a pack or is_causal say it all.
        dropout: of attention weights; 0 while distilling.
        scaling: of the products; None: D ** -0.5.
        sliding_window: positions that a token sees, itself included; None: all before it.
        row_lengths: see `rows_of_pack`; None for padded rows.
        cu_seq_lens_q: where the rows start, and where the last one ends, int32 [R + 1].
        position_ids: tells packed rows apart where the caller of the model did not say where they lie.
        kwargs: further arguments of the layer.

    Returns:
        [B, L, A, D] and None in place of attention weights. Gradient flows into query, key and value.
    """
    if row_lengths is None and position_ids is not None and len(query) == 1 and query.shape[2] == key.shape[2]:
        rows = rows_of_pack(position_ids, attention_mask)
        row_lengths, cu_seq_lens_q = rows.get("row_lengths"), rows.get("cu_seq_lens_q")
    if row_lengths is None or attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if _flash_can(query) and dropout == 0.0:
        assert cu_seq_lens_q is not None
        output = _flash_rows(query, key, value, cu_seq_lens_q, max(row_lengths), scaling, sliding_window)
        return output, None
    lengths = list(row_lengths)
    # Splitting costs one concatenation in the backward pass; slicing would cost a gradient of all rows for each row.
    split = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        scaled_dot_product_attention(
            query_row,
            key_row,
            value_row,
            attn_mask=_band(query_row, sliding_window),
            is_causal=sliding_window is None or query_row.shape[2] <= sliding_window,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)
        for query_row, key_row, value_row in split
    ]
    return torch.cat(outputs, dim=1), None


def _band(query_row: Tensor, sliding_window: int | None) -> Tensor | None:
    """Mask of one row that is longer than the sliding window, [length, length]."""
    length = query_row.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    age = torch.arange(length, device=query_row.device)[:, None] - torch.arange(length, device=query_row.device)
    return (age >= 0) & (age < sliding_window)


def _flash_can(query: Tensor) -> bool:
    """Whether PyTorch's variable-length flash kernel computes such queries."""
    head_size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in _FLASH_DTYPES
        and head_size % 8 == 0
        and head_size <= _FLASH_MAX_HEAD_SIZE
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        # The kernel counts the positions before a token, without the token itself; 0 after it is causal.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


def _mask(
    *args: Any, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
) -> Tensor | None:
    """No mask for packed rows, transformers' own for padded ones."""
    # transformers turns the skip off where it sees position ids restart.
    if attention_mask is None and not allow_is_causal_skip:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


AttentionInterface.register(PER_ROW_SDPA, per_row_attention)
AttentionMaskInterface.register(PER_ROW_SDPA, _mask)
