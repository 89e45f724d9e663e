"""Token cross-entropy with an optional z-loss: SFT, sequence-level distillation and the pre-training loss J_PT."""

# S states, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from openrlhf_bd.functional.head import DenseHead, StudentHead
from openrlhf_bd.functional.metrics import SECOND_MOMENT, Metrics, weighted


def token_cross_entropy(
    head: StudentHead, target_S: Tensor, mask_S: Tensor, *, denominator: float, z_loss_coef: float = 0.0
) -> tuple[Tensor, Metrics]:
    """Cross-entropy of a micro-batch, and the squared log-sum-exp of its logits.

    L = (1/N) sum_t m_t { -log softmax(z_t)(y_t) + lambda_z (log sum_a exp z_t(a))^2 }

    Args:
        head: student's logits at the states. Gradient flows.
        target_S: target token of each state, int64; ignored where the mask is 0.
        mask_S: m, bool or weights >= 0 (see trajectories.reduction_weights).
        denominator: N, the count of the GLOBAL batch that the mask's weights add up to.
        z_loss_coef: lambda_z.

    Returns:
        (loss, metrics): scalar, and sums and weights of `gpt_loss` (all of the loss), `nll`, `accuracy`, `entropy`,
        `logsumexp` and its second moment.

    Raises:
        ValueError: lengths differ, or the count is not positive.
    """
    if not head.num_states == len(target_S) == len(mask_S):
        raise ValueError(
            f"{head.num_states} states of logits, {len(target_S)} targets, {len(mask_S)} mask entries; all must agree"
        )
    if denominator <= 0:
        raise ValueError(f"the count of the global batch is {denominator}; it must be positive")
    term = head.cross_entropy(target_S, mask_S, z_loss_coef=z_loss_coef)
    counted_S, logsumexp_S, nll_S = mask_S > 0, term.logsumexp_S, term.nll_S
    statistics = head.statistics()
    return term.sum / denominator, {
        "gpt_loss": weighted(nll_S + z_loss_coef * logsumexp_S.square(), mask_S),
        "nll": weighted(nll_S, counted_S),
        "accuracy": weighted(statistics.argmax_S == target_S, counted_S),
        "entropy": weighted(statistics.entropy_S, counted_S),
        "logsumexp": weighted(logsumexp_S, counted_S),
        f"logsumexp{SECOND_MOMENT}": weighted(logsumexp_S.double().square(), counted_S),
    }


@torch.no_grad()
def sum_of_nll(head: StudentHead, target_S: Tensor, mask_S: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of -log softmax(z_t)(y_t): what a validation loss is the quotient of.

    Args:
        head: student's logits at the states. No gradient flows.
        target_S: target token of each state, int64; ignored where the mask is False.
        mask_S: states that count, bool.

    Returns:
        (sum, count), nats and tokens, float64 scalars; add them over micro-batches and ranks, then divide.
    """
    nll_S = head.cross_entropy(target_S, mask_S.float()).nll_S
    return nll_S.double().sum(), mask_S.sum().double()


def token_cross_entropy_from_logits(
    logits_SV: Tensor, target_S: Tensor, mask_S: Tensor, *, denominator: float, z_loss_coef: float = 0.0
) -> tuple[Tensor, Metrics]:
    """token_cross_entropy of dense logits, [S, V]; see there."""
    return token_cross_entropy(DenseHead(logits_SV), target_S, mask_S, denominator=denominator, z_loss_coef=z_loss_coef)
