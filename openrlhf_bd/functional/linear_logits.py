"""Logits as a product of hidden states and an output embedding that is never formed as a whole."""

# S states, H hidden size, V vocabulary, C columns, R rows

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from openrlhf_bd.functional.gradient_sink import GradientSink

FLOOR = -1e30  # in place of -inf in running sums, where 0 * -inf would be NaN


@dataclass(frozen=True)
class LinearLogits:
    """z = scale * (hidden_SH weight_VH^T + bias_V), float32 (float64 where the hidden states are).

    Attributes:
        hidden_SH: hidden states before the output embedding.
        weight_VH: output embedding itself, not an alias: functions that read it in their backward pass save this very
            tensor, whose storage ZeRO-3 takes away and brings back in between.
        bias_V: its bias, or None.
        scale: 1 / temperature.
        sink: where gradients of weight and bias go.
        anchor: what stands for weight and bias in the graph (see GradientSink).
    """

    hidden_SH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    scale: float
    sink: GradientSink
    anchor: Tensor

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of logits, losses and sums."""
        return torch.promote_types(self.hidden_SH.dtype, torch.float32)

    @cached_property
    def factor_dtype(self) -> torch.dtype:
        """Type of the factors of products: half precision where the device multiplies it exactly into float32."""
        same = self.hidden_SH.dtype == self.weight_VH.dtype
        return self.hidden_SH.dtype if same and self.hidden_SH.is_cuda else self.dtype

    @cached_property
    def vocab_size(self) -> int:
        """V, also where ZeRO-3 has taken the weight away since."""
        return len(self.weight_VH)

    @torch.no_grad()
    def block(self, states: slice | Tensor, ids: slice | Tensor) -> Tensor:
        """Logits of some states and ids. No gradient flows."""
        rows_RH, weight_CH = self.hidden_SH[states].to(self.factor_dtype), self.weight_VH[ids].to(self.factor_dtype)
        return self.product(rows_RH, weight_CH, self.offset(ids))

    def product(
        self, rows_RH: Tensor, weight_CH: Tensor, offset_C: Tensor | None, *, out: Tensor | None = None
    ) -> Tensor:
        """scale * rows weight^T + offset, [R, C], in `out` where it is given."""
        z_RC = product(rows_RH, weight_CH.T, self.dtype, out=out)
        if self.scale != 1.0:
            z_RC *= self.scale
        if offset_C is not None:
            z_RC += offset_C
        return z_RC

    def offset(self, ids: slice | Tensor) -> Tensor | None:
        """scale * bias of some ids, at least FLOOR; None without a bias. No gradient flows."""
        if self.bias_V is None:
            return None
        return (self.bias_V.detach()[ids].to(self.dtype) * self.scale).clamp(min=FLOOR)


def product(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """a @ b in `dtype`: half-precision factors are multiplied exactly and summed in it."""
    if a.is_cuda and a.dtype == b.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, rounded once to out's type."""
    if a.dtype == b.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += product(a, b, torch.promote_types(out.dtype, torch.float32))
