"""Word-level distillation over the whole vocabulary: forward KL to a live teacher's distribution at every state."""

# S states

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.checks import check_states
from openrlhf_bd.functional.diagnostics import source_metrics, state_metrics
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.metrics import Metrics, weighted
from openrlhf_bd.functional.trajectories import Trajectories, reduction_weights

if TYPE_CHECKING:
    from openrlhf_bd.config import DistillConfig


def full_kl_loss(
    head: StudentHead,
    teacher: StudentHead,
    trajectories: Trajectories,
    options: DistillConfig,
    *,
    num_tokens: float,
    num_rows: float,
    stop_ids: Sequence[int] = (),
    full_diagnostics: bool = True,
) -> tuple[Tensor, Metrics]:
    """Mean over response tokens of the KL from the teacher to the student at their states.

    L = (1/N) sum_t sum_a pi*(a | s_t) log [ pi*(a | s_t) / pi(a | s_t) ],   pi = softmax(z / tau)

    in tiles of the vocabulary (functional.full_kl): no [S, V] tensor exists where the heads are sparse.

    Args:
        head: student's logits at the S states. Gradient flows.
        teacher: teacher's logits at the same states over the same ids. No gradient flows.
        trajectories: which states have an action; the actions are read by metrics alone.
        options: reduction, tau.
        num_tokens: N, response tokens of the global batch, for options.reduction token.
        num_rows: rows of the global batch, for options.reduction sequence (the mean of per-row means).
        stop_ids: stop tokens, for the metric of their probability alone.
        full_diagnostics: also compute metrics that read all logits; without it they are there where they cost nothing.

    Returns:
        (loss, metrics): nats; see functional.diagnostics for the metrics' names.

    Raises:
        ValueError: heads and trajectories differ in their states or ids, or the count is not positive.
    """
    denominator = num_tokens if options.reduction == "token" else num_rows
    # Every id is a candidate: there are no sets of which metrics could tell.
    sets = CandidateSets.whole(head.num_states, head.device)
    check_states(head, sets, trajectories, denominator)
    head = head.tempered(options.tau)
    weight_S = reduction_weights(trajectories, options.reduction)
    term = head.forward_kl(teacher, weight_S)
    z_M, in_set_S = torch.empty(0, device=head.device), trajectories.has_action_S
    return term.sum / denominator, {
        "policy_loss": weighted(term.value_S, weight_S),
        "forward_kl": weighted(term.value_S, trajectories.has_action_S),
        **source_metrics(trajectories, {"policy_loss": (term.value_S, weight_S)}),
        **state_metrics(head, sets, trajectories, z_M, in_set_S, stop_ids=stop_ids, full=full_diagnostics),
    }
