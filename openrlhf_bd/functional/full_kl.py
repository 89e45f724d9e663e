"""KL between two heads over the whole vocabulary, in tiles."""

# S states, R states that take part, C ids of a tile

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openrlhf_bd.functional.linear_logits import FLOOR
from openrlhf_bd.functional.streaming import Moments
from openrlhf_bd.functional.tiles import LinearGradients, Tile, Walk

if TYPE_CHECKING:
    from openrlhf_bd.functional.head import StudentHead


def forward_kl(walk: Walk, teacher: StudentHead) -> tuple[Tensor, Moments]:
    """KL(teacher || student) of each state, and the student's moments.

    sum_a p_T(a) [log p_T(a) - log p_S(a)]

    Args:
        walk: the student's, over the whole vocabulary. Gradient flows to hidden states, weight and bias: p_S - p_T.
        teacher: over the same states and ids. No gradient flows.

    Returns:
        ([S] nats, 0 at states that take no part; moments of the states that do).
    """
    teacher_R = teacher.statistics().logsumexp_S[walk.states_R].to(walk.logits.dtype)
    student, gap_R = _student_and_gap(walk, teacher, teacher_R)
    student_R = student.logsumexp()
    logsumexps = gap_R.new_zeros(2, teacher.num_states)
    logsumexps[:, walk.states_R] = torch.stack([teacher_R, student_R])
    value_S = gap_R.new_zeros(teacher.num_states).index_copy(0, walk.states_R, gap_R - (teacher_R - student_R))
    out_S: Tensor = _WithGradient.apply(walk.logits.anchor, walk.logits.hidden_SH, value_S, logsumexps, walk, teacher)
    return out_S, student


@torch.no_grad()
def _student_and_gap(walk: Walk, teacher: StudentHead, teacher_R: Tensor) -> tuple[Moments, Tensor]:
    """The student's moments, and sum_a p_T(a) [z_T(a) - z_S(a)] of each row: small where the two are near each other,
    so that float32 keeps a small KL."""
    running = Moments.empty(len(walk.states_R), walk.logits)
    gap_R = torch.zeros_like(running.total_R)
    for tile in walk.tiles():
        z_RC = _teacher_block(tile, walk.states_R, teacher)
        p_RC = torch.exp(z_RC - teacher_R[tile.rows, None])
        gap_R[tile.rows] += p_RC.mul_(z_RC.sub_(tile.z_RC)).sum(dim=1)
        running.add_tile_(tile)
    return running, gap_R


def _teacher_block(tile: Tile, states_R: Tensor, teacher: StudentHead) -> Tensor:
    assert isinstance(tile.ids, slice)
    return teacher.block(states_R[tile.rows], tile.ids).to(tile.z_RC.dtype).clamp_(min=FLOOR)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        hidden_SH: Tensor,
        value_S: Tensor,
        logsumexps: Tensor,
        walk: Walk,
        teacher: StudentHead,
    ) -> Tensor:
        ctx.save_for_backward(hidden_SH, walk.logits.weight_VH, walk.logits.bias_V, logsumexps)
        ctx.walk, ctx.teacher = walk, teacher
        return value_S.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_SH, weight_VH, bias_V, logsumexps = ctx.saved_tensors
        needs_anchor, needs_hidden = ctx.needs_input_grad[:2]
        logits = replace(ctx.walk.logits, hidden_SH=hidden_SH, weight_VH=weight_VH, bias_V=bias_V)
        states_R = ctx.walk.states_R[grad_outputs[0][ctx.walk.states_R] != 0]
        teacher_R, student_R = logsumexps[:, states_R]
        gradients = LinearGradients(
            logits, states_R, grad_outputs[0][states_R], to_weight=needs_anchor, to_hidden=needs_hidden
        )
        for tile in replace(ctx.walk, logits=logits, states_R=states_R).tiles():
            p_teacher_RC = _teacher_block(tile, states_R, ctx.teacher).sub_(teacher_R[tile.rows, None]).exp_()
            gradients.add(tile, tile.z_RC.sub_(student_R[tile.rows, None]).exp_().sub_(p_teacher_RC))
        return gradients.of_anchor(), gradients.of_hidden(), None, None, None, None
