"""Walks over logits in tiles: the output embedding is read once a walk, and no [S, V] tensor exists."""

# S states, R rows of a walk (some of the states), K columns of a walk, C columns of a tile, H hidden size,
# V vocabulary, M candidates of all states

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.linear_logits import LinearLogits, add_product_, product
from openrlhf_bd.functional.negatives import SharedNegatives

CPU_TILE_ELEMENTS = 1 << 22  # logits of a tile: 16 MiB, near a CPU's caches, and few waits for all its threads
DEVICE_TILE_ELEMENTS = 1 << 25  # enough work for a GPU
MIN_COLUMNS = 256  # fewer columns a tile slow matrix products down; then rows are split too


@dataclass(frozen=True)
class Columns:
    """What a walk sums over.

    Attributes:
        size: K.
        ids_K: ids in ascending order; None: the whole vocabulary.
        log_weight_K: added to the logits of these ids, nats; None: nothing.
    """

    size: int
    ids_K: Tensor | None = None
    log_weight_K: Tensor | None = None

    @staticmethod
    def sampled(negatives: SharedNegatives) -> Columns:
        """The ids of a weighted sample of the vocabulary."""
        return Columns(len(negatives.ids_K), negatives.ids_K, negatives.log_weight_K)

    def column_of(self, ids_M: Tensor) -> Tensor:
        """Column of each id; in a sample every id that is asked for must be there."""
        return ids_M if self.ids_K is None else torch.searchsorted(self.ids_K, ids_M)


@dataclass(frozen=True)
class Tile:
    """Logits of some rows and columns of a walk.

    Attributes:
        rows: range of the walk's rows.
        ids: ids of the columns, as an index of the weight.
        excluded: range of the walk's excluded pairs that lie here, and their flat index into z_RC; they keep their
            logits here. None where the walk excludes nothing.
        z_RC: logits, for the caller to overwrite; the next tile does so too.
        scratch_RC: a second tile of the same kind.
        weight_CH: rows of the weight, in the type that products are made in.
    """

    rows: slice
    ids: slice | Tensor
    excluded: tuple[slice, Tensor] | None
    z_RC: Tensor
    scratch_RC: Tensor
    weight_CH: Tensor


@dataclass(frozen=True)
class Excluded:
    """Candidates that a walk leaves out, in the order in which it meets them.

    Attributes:
        row_M: row of the walk.
        ids_M: id.
        flat_M: place in its tile.
        counts: how many there are in each tile.
    """

    row_M: Tensor
    ids_M: Tensor
    flat_M: Tensor
    counts: list[int]


@dataclass(frozen=True)
class Walk:
    """Some states' logits over some columns.

    Attributes:
        logits: the linear map.
        states_R: states that take part, ascending.
        columns: ids that take part.
        outside: sets whose candidates are left out at their state; None: nothing is.
    """

    logits: LinearLogits
    states_R: Tensor
    columns: Columns
    outside: CandidateSets | None = None

    def tiles(self) -> Iterator[Tile]:
        """Every tile, row blocks within column blocks. No gradient flows.

        All tiles lie in the same two buffers: memory that is allocated anew for each would be fresh pages, or would
        grow the heap around whatever small tensors were kept in between.
        """
        logits, columns, num_rows = self.logits, self.columns, len(self.states_R)
        if not num_rows:
            return
        width, height = self.tile_shape
        rows_RH = logits.hidden_SH.detach()[self.states_R].to(logits.factor_dtype)
        buffers = rows_RH.new_empty(2, min(height, num_rows) * width, dtype=logits.dtype)
        counts = iter(self.excluded.counts) if self.excluded else None
        met = 0
        for first in range(0, columns.size, width):
            here = slice(first, min(first + width, columns.size))
            ids = here if columns.ids_K is None else columns.ids_K[here]
            weight_CH = logits.weight_VH.detach()[ids].to(logits.factor_dtype)
            offset_C = logits.offset(ids)
            if columns.log_weight_K is not None:
                offset_C = columns.log_weight_K[here].to(logits.dtype) + (0.0 if offset_C is None else offset_C)
            for start in range(0, num_rows, height):
                rows = slice(start, min(start + height, num_rows))
                shape = rows.stop - start, len(weight_CH)
                z_RC, scratch_RC = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
                logits.product(rows_RH[rows], weight_CH, offset_C, out=z_RC)
                excluded = None
                if self.excluded is not None and counts is not None:
                    pairs = slice(met, met + next(counts))
                    excluded, met = (pairs, self.excluded.flat_M[pairs]), pairs.stop
                yield Tile(rows, ids, excluded, z_RC, scratch_RC, weight_CH)

    @cached_property
    def tile_shape(self) -> tuple[int, int]:
        """Columns and rows of a tile."""
        num_rows, device = max(1, len(self.states_R)), self.logits.hidden_SH.device.type
        elements = CPU_TILE_ELEMENTS if device == "cpu" else DEVICE_TILE_ELEMENTS
        most = max(1, elements // self.logits.hidden_SH.shape[1])  # the tile's rows of the weight may be a copy
        width = max(1, min(self.columns.size, most, max(MIN_COLUMNS, elements // num_rows)))
        return width, max(1, elements // width)

    @cached_property
    def excluded(self) -> Excluded | None:
        """The candidates that the walk leaves out."""
        if self.outside is None:
            return None
        sets, (width, height) = self.outside, self.tile_shape
        row_S = torch.full((sets.num_states,), -1, device=self.states_R.device)
        row_S[self.states_R] = torch.arange(len(self.states_R), device=self.states_R.device)
        row_M = row_S[sets.state_M]
        row_M, ids_M = row_M[row_M >= 0], sets.ids_M[row_M >= 0]
        column_M = self.columns.column_of(ids_M)
        blocks_of_rows = -(-len(self.states_R) // height)
        blocks_of_columns = -(-self.columns.size // width)
        tile_M = column_M // width * blocks_of_rows + row_M // height
        width_M = (self.columns.size - column_M // width * width).clamp(max=width)
        flat_M = row_M % height * width_M + column_M % width
        counts = torch.bincount(tile_M, minlength=blocks_of_rows * blocks_of_columns).tolist()
        order_M = torch.argsort(tile_M)
        return Excluded(row_M[order_M], ids_M[order_M], flat_M[order_M], counts)


class LinearGradients:
    """Gradients of hidden states, weight and bias from tiles of dL/dz that have one factor a row in common.

    dL/dz = grad_R tile_RC gives dL/dhidden = scale grad_R (tile @ weight), dL/dweight = tile^T @ (scale grad_R hidden):
    the factor meets [R, H] tensors only.

    Args:
        logits: the linear map.
        states_R: states of the walk.
        grad_R: factor of each row.
        to_weight: whether weight or bias need a gradient; it goes to the sink.
        to_hidden: whether the hidden states need one.
    """

    def __init__(
        self, logits: LinearLogits, states_R: Tensor, grad_R: Tensor, *, to_weight: bool, to_hidden: bool
    ) -> None:
        self._logits, self._states_R, self._to_weight = logits, states_R, to_weight
        self._factor_R = grad_R.to(logits.dtype) * logits.scale
        self._weight_VH: Tensor | None
        self._bias_V: Tensor | None
        self._weight_VH, self._bias_V = logits.sink.buffers() if to_weight else [None, None]
        rows_RH = logits.hidden_SH.detach()[states_R].to(logits.dtype)
        self._hidden_RH = torch.zeros_like(rows_RH) if to_hidden else None
        self._rows_RH = rows_RH.mul_(self._factor_R[:, None]).to(logits.factor_dtype)

    def add(self, tile: Tile, p_RC: Tensor) -> None:
        """Add what a tile gives.

        Args:
            tile: its rows, ids and weight.
            p_RC: dL/dz of its elements, divided by the row's factor.
        """
        if self._bias_V is not None:
            add_rows_(self._bias_V, tile.ids, (p_RC.T @ self._factor_R[tile.rows]).to(self._bias_V.dtype))
        p_RC = p_RC.to(self._logits.factor_dtype)
        if self._hidden_RH is not None:
            add_product_(self._hidden_RH[tile.rows], p_RC, tile.weight_CH)
        if self._weight_VH is None:
            return
        if isinstance(tile.ids, slice):
            add_product_(self._weight_VH[tile.ids], p_RC.T, self._rows_RH[tile.rows])
        else:
            rows = product(p_RC.T, self._rows_RH[tile.rows], self._logits.dtype)
            add_rows_(self._weight_VH, tile.ids, rows.to(self._weight_VH.dtype))

    def of_anchor(self) -> Tensor | None:
        """What a function returns for the sink's anchor."""
        return self._factor_R.new_zeros(()) if self._to_weight else None

    def of_hidden(self) -> Tensor | None:
        """[S, H] in the type of the hidden states; 0 at states that are not in the walk."""
        if self._hidden_RH is None:
            return None
        hidden_SH = self._logits.hidden_SH
        grad_RH = self._hidden_RH.mul_(self._factor_R[:, None]).to(hidden_SH.dtype)
        return torch.zeros_like(hidden_SH).index_copy_(0, self._states_R, grad_RH)


def add_rows_(out: Tensor, ids: slice | Tensor, rows: Tensor) -> None:
    """out[ids] += rows; ids are distinct."""
    if isinstance(ids, slice):
        out[ids] += rows
    else:
        out.index_add_(0, ids, rows)
