"""The losses of gkd and rkl: a divergence between student and teacher at every state, whoever sampled the rows."""

# S states, M candidates of all states

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.checks import check_states
from openrlhf_bd.functional.diagnostics import source_metrics, state_metrics
from openrlhf_bd.functional.divergences import PolicyPair, coarsened_pair, jensen_shannon, projected_pair
from openrlhf_bd.functional.head import StudentHead, weighted_term
from openrlhf_bd.functional.metrics import Metrics, weighted
from openrlhf_bd.functional.trajectories import Trajectories, reduction_weights
from openrlhf_bd.functional.values import taken_candidate

if TYPE_CHECKING:
    from openrlhf_bd.config import DistillConfig


def divergence_loss(
    head: StudentHead,
    sets: CandidateSets,
    trajectories: Trajectories,
    options: DistillConfig,
    *,
    beta: float,
    num_tokens: float,
    num_rows: float,
    stop_ids: Sequence[int] = (),
    full_diagnostics: bool = True,
) -> tuple[Tensor, Metrics]:
    """Mean over response tokens of the generalised Jensen-Shannon divergence at their states.

    L = (1/N) sum_t JSD_beta(pi*(. | s_t), pi(. | s_t))       (functional.divergences; beta 0 and 1: the two KLs)

    over the candidates and one bucket for all other tokens, or between the projected policies (divergence_support). In
    a batch of the teacher's and the student's rows the share of each is its weight, as in GKD (Agarwal et al. 2024).

    Args:
        head: student's logits at the states. Gradient flows.
        sets: the teacher's candidate sets at the same states, with log-probabilities.
        trajectories: which states have an action; the actions are read by metrics alone.
        options: divergence_support, reduction, tau.
        beta: coefficient of the divergence, in [0, 1].
        num_tokens: N, response tokens of the global batch, for options.reduction token.
        num_rows: rows of the global batch, for options.reduction sequence (the mean of per-row means).
        stop_ids: stop tokens, for the metric of their probability alone.
        full_diagnostics: also compute metrics that read all logits; without it they are there where they cost nothing.

    Returns:
        (loss, metrics); see functional.diagnostics for their names.

    Raises:
        ConfigError: the sets have no log-probabilities.
        ValueError: head, sets and trajectories differ in their number of states, or the count is not positive.
    """
    denominator = num_tokens if options.reduction == "token" else num_rows
    check_states(head, sets, trajectories, denominator)
    head = head.tempered(options.tau)
    z_M = head.at_candidates(sets)
    wanted_by = f"--algo.distill.name {options.name}"
    if options.divergence_support == "set":
        pair = projected_pair(z_M, sets, wanted_by=wanted_by)
    else:
        pair, _ = coarsened_pair(head, z_M, sets, wanted_by=wanted_by)
    weight_S = reduction_weights(trajectories, options.reduction)
    term = weighted_term(jensen_shannon(pair, beta), weight_S)
    metrics = {
        "policy_loss": weighted(term.value_S, weight_S),
        **source_metrics(trajectories, {"policy_loss": (term.value_S, weight_S)}),
        **pair_metrics(pair, trajectories),
        **state_metrics(
            head,
            sets,
            trajectories,
            z_M,
            taken_candidate(sets, trajectories.taken_S) >= 0,
            stop_ids=stop_ids,
            full=full_diagnostics,
        ),
    }
    return term.sum / denominator, metrics


@torch.no_grad()
def pair_metrics(pair: PolicyPair, trajectories: Trajectories) -> Metrics:
    """Both KLs between the two policies, and the reverse one by source."""
    action_S, reverse_S = trajectories.has_action_S, jensen_shannon(pair, 1.0)
    return {
        "forward_kl": weighted(jensen_shannon(pair, 0.0), action_S),
        "reverse_kl": weighted(reverse_S, action_S),
        **source_metrics(trajectories, {"reverse_kl": (reverse_S, action_S)}),
    }
