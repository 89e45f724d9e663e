"""log sum exp over the vocabulary in tiles, with everything else that one walk gives.

A walk forward keeps a running maximum and running sums for each state; a walk backward makes each tile again, turns it
into probabilities and multiplies these into the gradients: four products of S x V x H for value and gradient. Three
would do if the gradient's scale were known in the walk forward. The fourth buys one gradient buffer for all terms of a
loss, any scale of the loss, and a backward walk over only those states that have a gradient.
"""

# S states, R rows of a walk (some of the states), C columns of a tile, H hidden size, V vocabulary,
# M candidates of all states

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openrlhf_bd.functional.linear_logits import FLOOR, LinearLogits
from openrlhf_bd.functional.segments import segment_max, segment_sum
from openrlhf_bd.functional.tiles import LinearGradients, Tile, Walk


@dataclass(frozen=True)
class Moments:
    """Sums of exp(z) over some ids of each row, relative to their maximum m.

    Attributes:
        max_R: m, nats; FLOOR or below where there is no id.
        total_R: sum exp(z - m).
        first_R: sum (z - m) exp(z - m).
        argmax_R: id of the maximum.
    """

    max_R: Tensor
    total_R: Tensor
    first_R: Tensor
    argmax_R: Tensor

    @staticmethod
    def empty(num_rows: int, logits: LinearLogits) -> Moments:
        """Of no id."""
        zeros_R = torch.zeros(num_rows, dtype=logits.dtype, device=logits.hidden_SH.device)
        return Moments(torch.full_like(zeros_R, FLOOR), zeros_R, zeros_R.clone(), zeros_R.long())

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.max_R, self.total_R, self.first_R, self.argmax_R

    def add_tile_(self, tile: Tile) -> None:
        """Add the elements of a tile, in place; the tile is overwritten."""
        z_RC, ids = tile.z_RC, tile.ids
        max_R, total_R, first_R, argmax_R = (x_R[tile.rows] for x_R in self._parts)  # views
        new_max_R = torch.maximum(max_R, z_RC.amax(dim=1))
        # A maximum is beaten a few times in a walk, and where it is not nobody need know which id came nearest.
        beaten = torch.nonzero(new_max_R > max_R)[:, 0]
        column = z_RC[beaten].argmax(dim=1)
        argmax_R[beaten] = ids.start + column if isinstance(ids, slice) else ids[column]

        change_R = max_R - new_max_R
        factor_R = torch.exp(change_R)
        first_R.add_(change_R * total_R).mul_(factor_R)
        total_R.mul_(factor_R)
        max_R.copy_(new_max_R)
        weight_RC = torch.exp(z_RC.sub_(new_max_R[:, None]), out=tile.scratch_RC)
        total_R += weight_RC.sum(dim=1)
        first_R += weight_RC.mul_(z_RC).sum(dim=1)

    def plus(self, other: Moments) -> Moments:
        """Of the ids of both; they have none in common."""
        max_R = torch.maximum(self.max_R, other.max_R)
        total_R, first_R = torch.zeros_like(max_R), torch.zeros_like(max_R)
        for part in (self, other):
            change_R = part.max_R - max_R
            factor_R = torch.exp(change_R)
            total_R += factor_R * part.total_R
            first_R += factor_R * (part.first_R + change_R * part.total_R)
        argmax_R = torch.where(self.max_R >= other.max_R, self.argmax_R, other.argmax_R)
        return Moments(max_R, total_R, first_R, argmax_R)

    def logsumexp(self) -> Tensor:
        """[R], nats; -inf where there is no id."""
        return torch.where(self.max_R <= FLOOR, float("-inf"), self.max_R + torch.log(self.total_R))

    def entropy(self) -> Tensor:
        """Of softmax(z), [R], nats."""
        return torch.log(self.total_R) - self.first_R / self.total_R

    @staticmethod
    def of_pairs(z_M: Tensor, row_M: Tensor, id_M: Tensor, num_rows: int) -> Moments:
        """Of single elements."""
        max_R = segment_max(z_M, row_M, num_rows, initial=FLOOR)
        shifted_M = z_M - max_R[row_M]
        weight_M = torch.exp(shifted_M)
        best_M = torch.where(shifted_M == 0, id_M, 0)
        return Moments(
            max_R,
            segment_sum(weight_M, row_M, num_rows),
            segment_sum(weight_M * shifted_M, row_M, num_rows),
            segment_max(best_M, row_M, num_rows, initial=0),
        )


class KnownStatistics:
    """Statistics of those states that a walk over the vocabulary has met; zeros elsewhere."""

    def __init__(self, known_S: Tensor, logsumexp_S: Tensor, entropy_S: Tensor, argmax_S: Tensor) -> None:
        self.known_S, self.logsumexp_S, self.entropy_S, self.argmax_S = known_S, logsumexp_S, entropy_S, argmax_S
        self.num_missing = len(known_S)

    @staticmethod
    def none(num_states: int, logits: LinearLogits) -> KnownStatistics:
        """Of no state."""
        zeros_S = torch.zeros(num_states, dtype=logits.dtype, device=logits.hidden_SH.device)
        return KnownStatistics(zeros_S.bool(), zeros_S, zeros_S.clone(), zeros_S.long())

    def narrow(self, start: int, length: int) -> KnownStatistics:
        """A copy of a range of states."""
        parts = (self.known_S, self.logsumexp_S, self.entropy_S, self.argmax_S)
        narrowed = KnownStatistics(*(part.narrow(0, start, length).clone() for part in parts))
        narrowed.num_missing = length if self.num_missing == len(self.known_S) else int((~narrowed.known_S).sum())
        return narrowed

    def missing(self, states_R: Tensor) -> Tensor:
        """Those of the states that are not known."""
        return states_R[~self.known_S[states_R]] if self.num_missing else states_R[:0]

    def record(self, states_R: Tensor, whole: Moments) -> None:
        """Keep what a walk over the whole vocabulary found."""
        if not self.num_missing:
            return
        self.num_missing -= len(self.missing(states_R))
        self.known_S[states_R] = True
        self.logsumexp_S[states_R] = whole.logsumexp()
        self.entropy_S[states_R] = whole.entropy()
        self.argmax_S[states_R] = whole.argmax_R


@torch.no_grad()
def walk_moments(
    walk: Walk, *, shift_R: Tensor | None = None, floor: float | None = None
) -> tuple[Moments, Moments | None]:
    """Moments of max(z - shift, floor) over a walk, and of the candidates that it leaves out.

    Args:
        walk: the walk, over at least one state.
        shift_R: shift of each row, nats; None: 0.
        floor: lower clip after the shift, nats; None: no clip.

    Returns:
        (of the elements that take part, of those left out or None where nothing is).
    """
    running = Moments.empty(len(walk.states_R), walk.logits)
    excluded = walk.excluded
    left_M = None if excluded is None else running.total_R.new_empty(len(excluded.flat_M))
    for tile in walk.tiles():
        z_RC = tile.z_RC
        if shift_R is not None:
            z_RC -= shift_R[tile.rows, None]
        if floor is not None:
            z_RC.clamp_(min=floor)
        if tile.excluded is not None and left_M is not None:
            pairs, flat_M = tile.excluded
            left_M[pairs] = z_RC.view(-1)[flat_M]
            z_RC.view(-1).index_fill_(0, flat_M, FLOOR)
        running.add_tile_(tile)
    if excluded is None or left_M is None:
        return running, None
    return running, Moments.of_pairs(left_M, excluded.row_M, excluded.ids_M, len(walk.states_R))


def with_gradient(walk: Walk, value_S: Tensor, *, shift_S: Tensor | None = None, floor: float | None = None) -> Tensor:
    """value_S = log sum exp max(z - shift, floor) over a walk, as computed before, with its gradient.

    dvalue/dz = exp(z - shift - value) where the element takes part and lies above the floor; dvalue/dshift = minus the
    sum of that. States that take no part, or whose value is -inf, have no gradient.

    Args:
        walk: the walk. Gradient flows to hidden states, weight and bias.
        value_S: the values of all states.
        shift_S: shift of each state. Gradient flows.
        floor: lower clip after the shift.

    Returns:
        value_S, [S].
    """
    out_S: Tensor = _WithGradient.apply(walk.logits.anchor, walk.logits.hidden_SH, shift_S, value_S, walk, floor)
    return out_S


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        hidden_SH: Tensor,
        shift_S: Tensor | None,
        value_S: Tensor,
        walk: Walk,
        floor: float | None,
    ) -> Tensor:
        logits = walk.logits
        out_S = value_S.clone()
        ctx.save_for_backward(hidden_SH, logits.weight_VH, logits.bias_V, shift_S, out_S)
        ctx.walk, ctx.floor = walk, floor
        return out_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_SH, weight_VH, bias_V, shift_S, value_S = ctx.saved_tensors
        needs_anchor, needs_hidden, needs_shift = ctx.needs_input_grad[:3]
        logits = replace(ctx.walk.logits, hidden_SH=hidden_SH, weight_VH=weight_VH, bias_V=bias_V)
        grad_S = grad_outputs[0]
        takes_part_S = torch.zeros_like(value_S, dtype=torch.bool).index_fill_(0, ctx.walk.states_R, True)
        states_R = torch.nonzero(takes_part_S & (grad_S != 0) & (value_S != float("-inf")))[:, 0]
        grad_R, value_R = grad_S[states_R], value_S[states_R]
        shift_R = torch.zeros_like(value_R) if shift_S is None else shift_S.detach()[states_R]

        # Multiplying the rows by the gradient once leaves the tiles as plain probabilities.
        gradients = LinearGradients(logits, states_R, grad_R, to_weight=needs_anchor, to_hidden=needs_hidden)
        total_R = torch.zeros_like(value_R)
        for tile in replace(ctx.walk, logits=logits, states_R=states_R).tiles():
            p_RC, rows = tile.z_RC, tile.rows
            clipped_RC = None if ctx.floor is None else p_RC - shift_R[rows, None] < ctx.floor
            p_RC.sub_((value_R + shift_R)[rows, None]).exp_()
            if clipped_RC is not None:
                p_RC.masked_fill_(clipped_RC, 0.0)
            if tile.excluded is not None:
                p_RC.view(-1).index_fill_(0, tile.excluded[1], 0.0)
            gradients.add(tile, p_RC)
            if needs_shift:
                total_R[rows] += p_RC.sum(dim=1)
        shift_grad_S = torch.zeros_like(value_S).index_copy_(0, states_R, -grad_R * total_R) if needs_shift else None
        return gradients.of_anchor(), gradients.of_hidden(), shift_grad_S, None, None, None
