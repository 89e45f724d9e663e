"""The Bellman Distill objective (Eq. 17) over candidate sets, as a loss, with every documented variant."""

# S states, M candidates of all states, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from openrlhf_bd.config import BellmanOptions
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.diagnostics import LossParts, bellman_diagnostics
from openrlhf_bd.functional.head import DenseHead, StudentHead
from openrlhf_bd.functional.metrics import Metrics
from openrlhf_bd.functional.regularisers import reward_penalty
from openrlhf_bd.functional.segments import segment_logsumexp
from openrlhf_bd.functional.trajectories import Trajectories, reduction_weights
from openrlhf_bd.functional.values import (
    NEG_INF,
    negative_log_policy_expected,
    negative_log_policy_taken,
    q_values,
    teacher_mass,
    transitions,
)


@dataclass(frozen=True)
class BellmanTerms:
    """Loss of a micro-batch and its metrics (see functional.diagnostics for their names).

    Attributes:
        loss: scalar; the sum over micro-batches and ranks is the loss of the global batch. Gradient flows.
        metrics: name -> (sum, weight).
    """

    loss: Tensor
    metrics: Metrics


def bellman_loss(
    head: StudentHead,
    sets: CandidateSets,
    trajectories: Trajectories,
    options: BellmanOptions,
    *,
    num_tokens: float,
    num_rows: float,
    shift_constant: float | None = None,
    stop_ids: Sequence[int] = (),
) -> BellmanTerms:
    """Offline Bellman Distill loss of a micro-batch (Eq. 17, negated), and the binary tail term.

    L = (1/N) sum_t { u_t [-Q_t(a_t) + V_t] + u_t d_t [r_t - phi(r_t)] + lambda_tail tail_t }

    With chi-squared r - phi(r) = r^2 / (4 alpha). `linear_term expected` replaces u_t [-Q_t(a_t) + V_t] by its
    expectation under the teacher, in every state with an action; `out_of_set` then concerns the second term alone.

    Args:
        head: student's logits at the states. Gradient flows.
        sets: the teacher's candidate sets at the same states.
        trajectories: taken tokens and what follows what.
        options: every choice, see config.BellmanOptions.
        num_tokens: N, response tokens of the global batch, for options.reduction token.
        num_rows: rows of the global batch, for options.reduction sequence (the mean of per-row means).
        shift_constant: nats, in units of logits / tau; for options.q_shift constant.
        stop_ids: stop tokens, for the metric of their probability alone.

    Returns:
        BellmanTerms; a non-finite loss is returned as it is.

    Raises:
        ConfigError: options contradict each other or what was given.
        ValueError: head, sets and trajectories differ in their number of states, or the count is not positive.
    """
    validate_options(options)
    denominator = num_tokens if options.reduction == "token" else num_rows
    _check_shapes(head, sets, trajectories, denominator)
    head = head.tempered(options.tau)
    z_M = head.at_candidates(sets)
    q_M, clipped_M = q_values(z_M, head, sets, options, shift_constant=shift_constant)
    steps = transitions(q_M, sets, trajectories, options)

    action_S = trajectories.has_action_S
    if options.linear_term == "sampled":
        linear_S = negative_log_policy_taken(steps)
    else:
        linear_S = torch.where(action_S, negative_log_policy_expected(q_M, steps.value_S, sets), 0.0)
    td_S = reward_penalty(steps.reward_S, name=options.regulariser, alpha=options.alpha)
    tail_S = torch.zeros_like(linear_S)
    if options.tail_coef > 0:
        tail_S = options.tail_coef * torch.where(action_S, tail_cross_entropy(z_M, head, sets), 0.0)

    weight_S = reduction_weights(trajectories, options.reduction)
    parts = LossParts(linear_S, td_S, tail_S, weight_S)
    loss = (weight_S * (linear_S + td_S + tail_S)).sum() / denominator
    return BellmanTerms(
        loss, bellman_diagnostics(head, sets, trajectories, z_M, clipped_M, steps, parts, stop_ids=stop_ids)
    )


def bellman_loss_from_logits(
    logits_SV: Tensor,
    sets: CandidateSets,
    trajectories: Trajectories,
    options: BellmanOptions,
    *,
    num_tokens: float,
    num_rows: float,
    shift_constant: float | None = None,
    stop_ids: Sequence[int] = (),
) -> BellmanTerms:
    """bellman_loss of dense logits, [S, V]; see there."""
    return bellman_loss(
        DenseHead(logits_SV),
        sets,
        trajectories,
        options,
        num_tokens=num_tokens,
        num_rows=num_rows,
        shift_constant=shift_constant,
        stop_ids=stop_ids,
    )


def tail_cross_entropy(z_M: Tensor, head: StudentHead, sets: CandidateSets) -> Tensor:
    """Cross-entropy between the teacher's and the student's mass inside and outside the candidate set.

    -P log P_theta - (1 - P) log(1 - P_theta),   P_theta = sum_{a in A_p(s)} softmax(z)(a)

    P_theta is the sigmoid of log sum exp inside minus log sum exp outside, both exact. 1 - P_theta taken from the
    whole partition function would vanish in float32 for a confident student, and its gradient with it.

    Args:
        z_M: logits at the candidates. Gradient flows.
        head: logits at the states. Gradient flows: softmax(z) is pulled towards mass P on the set.
        sets: candidate sets.

    Returns:
        [S], nats; 0 where the set is the whole vocabulary.
    """
    inside_S = segment_logsumexp(z_M, sets.state_M, sets.num_states)
    outside_S = head.logsumexp_outside(sets)
    everything_S = outside_S == NEG_INF
    logit_S = torch.where(everything_S, 0.0, inside_S - outside_S)
    mass_S = teacher_mass(sets, dtype=z_M.dtype)
    rest_S = -torch.expm1(-sets.neg_log_mass_S.to(z_M.dtype))
    tail_S = -mass_S * logsigmoid(logit_S) - rest_S * logsigmoid(-logit_S)
    return torch.where(everything_S, 0.0, tail_S)


def validate_options(
    options: BellmanOptions, *, has_logprobs: bool | None = None, has_shift_constant: bool | None = None
) -> None:
    """Refuse options that contradict each other, or what the run has.

    Args:
        options: the objective's options.
        has_logprobs: whether the candidates' log-probabilities are (or will be) recorded; None: not known here.
        has_shift_constant: whether the run's constant shift is there; None: not known here.

    Raises:
        ConfigError: the message names the options to change.
    """
    if options.q_shift == "none" and options.terminal == "zero" and options.regulariser != "none":
        raise ConfigError(
            "--algo.distill.q_shift none with --algo.distill.terminal zero teaches the student never to stop: the "
            "regulariser pulls the stop token's unshifted logit to 0, whatever the level of the others; use "
            "--algo.distill.terminal drop_chi, or a shift (constant)"
        )
    if options.out_of_set == "clip" and options.q_min is None:
        raise ConfigError(
            "--algo.distill.out_of_set clip puts Q_min in place of Q, and --algo.distill.q_min is none; set q_min "
            "(the paper uses -10) or use --algo.distill.out_of_set drop"
        )
    if options.linear_term == "expected" and has_logprobs is False:
        raise ConfigError(
            "--algo.distill.linear_term expected needs the candidates' log-probabilities, and they are not recorded; "
            "use --teacher.record_logprobs true, or --algo.distill.linear_term sampled"
        )
    if options.q_shift == "constant" and has_shift_constant is False:
        raise ConfigError(
            "--algo.distill.q_shift constant needs the run's constant, the mean log-sum-exp of the starting student's "
            "logits, and none was given; use another --algo.distill.q_shift"
        )


def _check_shapes(head: StudentHead, sets: CandidateSets, trajectories: Trajectories, denominator: float) -> None:
    counts = {"logits": head.num_states, "candidate sets": sets.num_states, "trajectories": trajectories.num_states}
    if len(set(counts.values())) > 1:
        raise ValueError(f"numbers of states differ: {counts}; all three describe the states of one micro-batch")
    if denominator <= 0:
        raise ValueError(f"the count of the global batch is {denominator}; it must be positive")
