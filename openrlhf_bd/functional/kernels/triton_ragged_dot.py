"""Ragged gather-dot as Triton kernels; the same functions as in reference.py, for CUDA.

Every kernel is bound by the bytes of the gathered rows, so each is laid out for bytes in flight. A program of 4 warps
holds a block of ROWS x BLOCK_H = 4,096 elements, 32 a thread, loaded 16 bytes at a time along H: 8 KiB in flight in
half precision, 16 KiB in float32. Compiled for sm_90 they take 34 (forward, half, H = 896) to 80 registers a thread
and spill next to nothing, so 6 to 12 programs share a multiprocessor: 50 KiB and more in flight, where 3.3 TB/s times
800 ns of latency ask for 20 KiB on each of 132.

Forward, one launch: a program takes ROWS candidates of the flattened M, whatever states they belong to, so sets of 1
and of 5,000 ids load all processors alike. It finds their states by bisection of the offsets (12 steps at S = 2,048,
from the cache) while its embedding rows are under way. The hidden row that neighbours share comes from the L1 cache
after its first use, and all hidden rows fit the L2 cache: device memory sees each about once.

Backward: grad_hidden (rows of the embedding, by state) and grad_weight (rows of the hidden states, by token, after one
stable sort of the ids) are the same sum of scaled rows over segments. One program owns one segment and one block of H
and writes it once: no atomics, so a result is the same to the bit on every run, and the thousands of states that hold
a frequent token don't contend. A long segment would leave its owner with a long serial loop, so segments of more than
TILE rows are summed in two stages: tiles of TILE flat rows first write partial sums (at most two such segments meet a
tile, one at each end), then the owner adds those. Nothing waits for the host: the shapes alone bound the grids (S or M
segments), and programs without work end after their first loads.
"""

# S states, S1 = S + 1, M candidates of all states (ragged), V vocabulary, H hidden size, G segments

# Arguments of kernels are pointers and blocks of whatever type the launch gives.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openrlhf_bd.functional.kernels.reference import accumulation_type

BLOCK_ELEMENTS = 4096  # rows x columns that a program holds in registers
MAX_BLOCK_H = 1024
TILE = 32  # rows of a segment that one program sums alone, in 8 steps at H >= 1024
LARGE_TILE, LARGE_NUM_ROWS = 128, 1 << 17  # with so many rows memory for partial sums counts, and latency is hidden
NUM_WARPS = 4


def ragged_dot_forward(
    hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, ids_M: Tensor, offsets_S1: Tensor
) -> Tensor:
    """Logit of every candidate: reference.ragged_dot_forward. Ids are not checked against V.

    Raises:
        ValueError: weight_VH is not contiguous.
    """
    num_candidates, hidden_size = len(ids_M), hidden_SH.shape[1]
    z_M = torch.empty(num_candidates, dtype=accumulation_type(hidden_SH, weight_VH), device=hidden_SH.device)
    if num_candidates == 0:
        return z_M
    rows, block_h = _block_shape(hidden_size)
    _gather_dot[(triton.cdiv(num_candidates, rows),)](
        hidden_SH.contiguous(),
        _contiguous(weight_VH, "weight_VH"),
        bias_V,
        ids_M.contiguous(),
        offsets_S1.contiguous(),
        z_M,
        num_candidates,
        len(offsets_S1),
        len(offsets_S1).bit_length(),
        H=hidden_size,
        ROWS=rows,
        BLOCK_H=block_h,
        num_warps=NUM_WARPS,
    )
    return z_M


def ragged_dot_backward(
    grad_M: Tensor,
    hidden_SH: Tensor,
    weight_VH: Tensor,
    ids_M: Tensor,
    offsets_S1: Tensor,
    grad_weight_VH: Tensor | None,
    grad_bias_V: Tensor | None,
) -> Tensor:
    """Gradient of the logits: reference.ragged_dot_backward. The same to the bit on every run.

    Raises:
        ValueError: weight_VH or a buffer is not contiguous.
    """
    num_states = len(offsets_S1) - 1
    dtype = accumulation_type(hidden_SH, weight_VH)
    if len(ids_M) == 0:
        return torch.zeros(hidden_SH.shape, dtype=dtype, device=hidden_SH.device)
    grad_hidden_SH = torch.empty(hidden_SH.shape, dtype=dtype, device=hidden_SH.device)
    grad_M = grad_M.to(dtype).contiguous()
    offsets_S1 = offsets_S1.contiguous()
    candidates_M = torch.arange(len(ids_M), dtype=offsets_S1.dtype, device=offsets_S1.device)
    state_M = torch.searchsorted(offsets_S1[1:], candidates_M, right=True, out_int32=True)
    states = _Segments(num_states, offsets_S1[:-1], offsets_S1[1:], state_M, None)
    weight_VH = _contiguous(weight_VH, "weight_VH")
    _segment_sums(grad_hidden_SH, weight_VH, ids_M.contiguous(), grad_M, states)
    if grad_weight_VH is None and grad_bias_V is None:
        return grad_hidden_SH

    sorted_M, order_M = torch.sort(ids_M.int(), stable=True)  # half the passes of a sort of int64
    first_M = torch.searchsorted(sorted_M, sorted_M, out_int32=True)
    end_M = torch.searchsorted(sorted_M, sorted_M, right=True, out_int32=True)
    tokens = _Segments(len(ids_M), first_M, end_M, first_M, sorted_M)
    grad_M = grad_M[order_M]
    if grad_weight_VH is not None:
        buffer_VH = _contiguous(grad_weight_VH, "grad_weight_VH")
        _segment_sums(buffer_VH, hidden_SH.contiguous(), state_M[order_M], grad_M, tokens)
    if grad_bias_V is not None:
        buffer_V1 = _contiguous(grad_bias_V, "grad_bias_V")[:, None]
        _segment_sums(buffer_V1, grad_M.new_ones(1, 1), torch.zeros_like(sorted_M), grad_M, tokens)
    return grad_hidden_SH


class _Segments(NamedTuple):
    """Runs of the M rows that are summed: segment g owns rows begin_G[g] to end_G[g].

    Attributes:
        num_segments: G.
        begin_G, end_G: bounds.
        segment_M: segment of each row.
        target_G: row of the result that a segment is added to; segments whose begin is not their own number are then
            the other rows of a segment and do nothing. None: segment g is written to row g.
    """

    num_segments: int
    begin_G: Tensor
    end_G: Tensor
    segment_M: Tensor
    target_G: Tensor | None


def _segment_sums(out: Tensor, source: Tensor, index_M: Tensor, scale_M: Tensor, segments: _Segments) -> None:
    """out[target_g] (+)= sum over the rows m of g: scale_m source[index_m]. All tensors contiguous, M > 0."""
    num_rows, hidden_size = len(index_M), source.shape[1]
    tile = TILE if num_rows < LARGE_NUM_ROWS else LARGE_TILE
    num_tiles = triton.cdiv(num_rows, tile)
    partial = torch.empty(2 * num_tiles, hidden_size, dtype=scale_M.dtype, device=scale_M.device)
    rows, block_h = _block_shape(hidden_size)
    columns = triton.cdiv(hidden_size, block_h)
    shape = {"H": hidden_size, "TILE": tile, "ROWS": rows, "BLOCK_H": block_h, "num_warps": NUM_WARPS}
    inputs = (source, index_M, scale_M, segments.begin_G, segments.end_G)
    _sum_tiles[(num_tiles, columns)](*inputs, segments.segment_M, partial, num_rows, **shape)
    _sum_segments[(segments.num_segments, columns)](*inputs, segments.target_G, partial, out, **shape)


def _block_shape(hidden_size: int) -> tuple[int, int]:
    block_h = min(max(triton.next_power_of_2(hidden_size), 16), MAX_BLOCK_H)
    return BLOCK_ELEMENTS // block_h, block_h


def _contiguous(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(
            f"ragged_dot: {name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}; the kernels read whole"
            " rows: pass a contiguous tensor"
        )
    return tensor


@triton.jit
def _load_rows(base, row, column, valid, H: tl.constexpr):
    """Block base[row, column] of a contiguous matrix of width H; 0 where a row is not valid or a column is past H."""
    pointers = base + row.to(tl.int64)[:, None] * H + column[None, :]
    return tl.load(pointers, mask=valid[:, None] & (column < H)[None, :], other=0.0)


@triton.jit
def _count_up_to(sorted_ptr, length, value, steps):
    """Number of elements of a sorted array that are <= value, for a block of values; steps >= log2(length + 1)."""
    low = tl.zeros_like(value)
    high = low + length
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        right = open_ & (tl.load(sorted_ptr + middle, mask=open_, other=0) <= value)
        high = tl.where(open_ & (right == 0), middle, high)
        low = tl.where(right, middle + 1, low)
    return low


@triton.jit(do_not_specialize=["num_candidates", "num_offsets", "search_steps"])  # compiled once for every M and S
def _gather_dot(
    hidden_ptr, weight_ptr, bias_ptr, ids_ptr, offsets_ptr, z_ptr, num_candidates, num_offsets, search_steps,
    H: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """z[m] = <hidden[state of m], weight[ids[m]]> + bias[ids[m]] of ROWS candidates."""
    sum_type = z_ptr.dtype.element_ty
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = m < num_candidates
    ids = tl.load(ids_ptr + m, mask=valid, other=0)
    column = tl.arange(0, BLOCK_H)
    weight = _load_rows(weight_ptr, ids, column, valid, H)  # needs no state: under way during the search
    state = _count_up_to(offsets_ptr, num_offsets, m, search_steps) - 1
    total = weight.to(sum_type) * _load_rows(hidden_ptr, state, column, valid, H).to(sum_type)
    for start in range(BLOCK_H, H, BLOCK_H):
        weight = _load_rows(weight_ptr, ids, start + column, valid, H)
        total += weight.to(sum_type) * _load_rows(hidden_ptr, state, start + column, valid, H).to(sum_type)
    z = tl.sum(total, axis=1)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + ids, mask=valid, other=0.0).to(sum_type)
    tl.store(z_ptr + m, z, mask=valid)


@triton.jit
def _add_rows(total, source_ptr, index_ptr, scale_ptr, begin, end, column, H: tl.constexpr, ROWS: tl.constexpr):
    """total plus scale[m] * source[index[m]] of begin <= m < end, in strides of ROWS; its rows are added later."""
    for start in range(begin, end, ROWS):
        m = start + tl.arange(0, ROWS)
        valid = m < end
        scale = tl.load(scale_ptr + m, mask=valid, other=0.0)
        index = tl.load(index_ptr + m, mask=valid, other=0)
        total += scale[:, None] * _load_rows(source_ptr, index, column, valid, H).to(total.dtype)
    return total


@triton.jit
def _add_partials(total, partial_ptr, begin, end, column, H: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """total plus the partial sums of a long segment from the tiles that it meets, in strides of ROWS."""
    last = (end - 1) // TILE
    for start in range(begin // TILE, last + 1, ROWS):
        tile = start + tl.arange(0, ROWS)
        row = 2 * tile + (tile * TILE < begin).to(tl.int32)  # slot 1 where the segment starts within the tile
        total += _load_rows(partial_ptr, row, column, tile <= last, H)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _sum_tiles(
    source_ptr, index_ptr, scale_ptr, begin_ptr, end_ptr, segment_ptr, partial_ptr, num_rows,
    H: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Partial sums of the long segments that meet a tile: slot 0, the one at its start; slot 1, the one at its end."""
    tile_begin = tl.program_id(0) * TILE
    tile_end = tl.minimum(tile_begin + TILE, num_rows)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    for slot in tl.static_range(2):
        segment = tl.load(segment_ptr + (tile_begin if slot == 0 else tile_end - 1))
        begin = tl.load(begin_ptr + segment).to(tl.int32)
        end = tl.load(end_ptr + segment).to(tl.int32)
        if (end - begin > TILE) & ((begin > tile_begin) | (slot == 0)):
            first, last = tl.maximum(begin, tile_begin), tl.minimum(end, tile_end)
            total = tl.zeros([ROWS, BLOCK_H], scale_ptr.dtype.element_ty)
            total = _add_rows(total, source_ptr, index_ptr, scale_ptr, first, last, column, H, ROWS)
            row = (2 * tl.program_id(0) + slot).to(tl.int64)
            tl.store(partial_ptr + row * H + column, tl.sum(total, axis=0), mask=column < H)


@triton.jit
def _sum_segments(
    source_ptr, index_ptr, scale_ptr, begin_ptr, end_ptr, target_ptr, partial_ptr, out_ptr,
    H: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The sum of a segment, from its rows or, if it is long, from its partial sums; written or added to its target."""
    segment = tl.program_id(0)
    begin = tl.load(begin_ptr + segment).to(tl.int32)
    end = tl.load(end_ptr + segment).to(tl.int32)
    target = segment if target_ptr is None else tl.load(target_ptr + segment)
    if (target_ptr is None) | (begin == segment):
        row = tl.arange(0, ROWS)
        column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        added_to = (row == 0) & (target_ptr is not None)
        total = _load_rows(out_ptr, target + tl.zeros_like(row), column, added_to, H).to(scale_ptr.dtype.element_ty)
        if end - begin > TILE:
            total = _add_partials(total, partial_ptr, begin, end, column, H, TILE, ROWS)
        else:
            total = _add_rows(total, source_ptr, index_ptr, scale_ptr, begin, end, column, H, ROWS)
        tl.store(out_ptr + target.to(tl.int64) * H + column, tl.sum(total, axis=0), mask=column < H)
