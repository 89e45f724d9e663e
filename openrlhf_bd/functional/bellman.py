"""The Bellman Distill objective (Eq. 17) over candidate sets, as a loss, with every documented variant."""

# S states, M candidates of all states, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.checks import check_states
from openrlhf_bd.functional.diagnostics import LossParts, bellman_diagnostics
from openrlhf_bd.functional.head import DenseHead, StudentHead, WeightedTerm
from openrlhf_bd.functional.metrics import Metrics
from openrlhf_bd.functional.options import validate_options
from openrlhf_bd.functional.regularisers import reward_penalty
from openrlhf_bd.functional.released import released_terms, released_weights
from openrlhf_bd.functional.segments import segment_logsumexp
from openrlhf_bd.functional.student_rows import pulled_actions, student_penalty, student_target
from openrlhf_bd.functional.trajectories import Trajectories, reduction_weights
from openrlhf_bd.functional.values import (
    ActionValues,
    Transitions,
    action_values,
    negative_log_policy_expected,
    negative_log_policy_taken,
    projected_log_teacher,
    transitions,
)

if TYPE_CHECKING:
    from openrlhf_bd.config import BellmanOptions


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
    td_scale: float = 1.0,
    target_head: StudentHead | None = None,
    generator: Generator | None = None,
    full_diagnostics: bool = True,
) -> BellmanTerms:
    """Bellman Distill loss of a micro-batch (Eq. 17, negated), and the binary tail term.

    L = (1/N) sum_t { u_t [-Q_t(a_t) + V_t] + w u_t d_t [r_t - phi(r_t)] + lambda_tail tail_t }

    With chi-squared r - phi(r) = r^2 / (4 alpha). `linear_term expected` replaces u_t [-Q_t(a_t) + V_t] by its
    expectation under the teacher, in every state with an action; `out_of_set` then concerns the second term alone.
    `objective released` has its own first two terms (functional.released). Rows that the student sampled (trajectories
    with a behaviour) have terms of their own in the same mean: functional.student_rows.

    Args:
        head: student's logits at the states. Gradient flows.
        sets: the teacher's candidate sets at the same states, or the whole vocabulary (CandidateSets.whole).
        trajectories: taken tokens and what follows what.
        options: every choice, see config.BellmanOptions.
        num_tokens: N, response tokens of the global batch, for options.reduction token.
        num_rows: rows of the global batch, for options.reduction sequence (the mean of per-row means).
        shift_constant: nats, in units of logits / tau; for options.q_shift constant.
        stop_ids: stop tokens, for the metric of their probability alone.
        td_scale: w, the warm-up of the regulariser's weight (see td_scale_at).
        target_head: the target network's logits at the same states, for options.next_value_gradient target. No
            gradient flows.
        generator: draws the tokens of options.tail_estimator sampled; on the head's device. None: torch's own.
        full_diagnostics: also compute metrics that read all logits; without it they are there where they cost nothing.

    Returns:
        BellmanTerms; a non-finite loss is returned as it is.

    Raises:
        ConfigError: options contradict each other or what was given; `released` with rows of the student.
        ValueError: head, sets and trajectories differ in their number of states, or the count is not positive.
    """
    validate_options(options)
    denominator = num_tokens if options.reduction == "token" else num_rows
    _check_inputs(head, sets, trajectories, options, denominator)
    head = head.tempered(options.tau)
    z_M = head.at_candidates(sets)
    weight_S = _weights(trajectories, options, dtype=z_M.dtype)
    # First of all terms: a pass over the vocabulary for the tail also gives the maximum or log-sum-exp of the shift.
    tail_weight_S = options.tail_coef / denominator * _tail_states(weight_S, trajectories, options)
    tail = _tail(head, z_M, sets, options, tail_weight_S, generator)

    taken_S, pull_S = trajectories.taken_S, pulled_actions(trajectories, options)
    values = action_values(head, z_M, sets, taken_S, options, shift_constant=shift_constant, pull_S=pull_S)
    target_values = _target_values(target_head, sets, taken_S, options, shift_constant=shift_constant, pull_S=pull_S)
    steps = transitions(values, trajectories, options, target_values=target_values)
    if options.objective == "released":
        linear_S, td_S = released_terms(
            values, sets, trajectories, alpha=options.alpha, gamma=options.gamma, vocab_size=head.vocab_size
        )
    else:
        linear_S, td_S = _eq17_terms(values, steps, sets, trajectories, options)
    td_S = td_scale * td_S

    parts = LossParts(linear_S, td_S, options.tail_coef * tail.value_S, weight_S)
    metrics = bellman_diagnostics(
        head, sets, trajectories, z_M, values.clipped_M, steps, parts, stop_ids=stop_ids, full=full_diagnostics
    )
    return BellmanTerms((weight_S * (linear_S + td_S)).sum() / denominator + tail.sum, metrics)


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
    td_scale: float = 1.0,
    target_logits_SV: Tensor | None = None,
    generator: Generator | None = None,
    full_diagnostics: bool = True,
) -> BellmanTerms:
    """bellman_loss of dense logits, [S, V]: the plain reference of every faster head; see there."""
    return bellman_loss(
        DenseHead(logits_SV),
        sets,
        trajectories,
        options,
        num_tokens=num_tokens,
        num_rows=num_rows,
        shift_constant=shift_constant,
        stop_ids=stop_ids,
        td_scale=td_scale,
        target_head=None if target_logits_SV is None else DenseHead(target_logits_SV),
        generator=generator,
        full_diagnostics=full_diagnostics,
    )


def td_scale_at(step: int, options: BellmanOptions) -> float:
    """Warm-up of the regulariser's weight: min(1, step / td_warmup_steps); 1 without a warm-up.

    Args:
        step: optimizer step, counted from 1.
        options: td_warmup_steps.
    """
    return min(1.0, step / options.td_warmup_steps) if options.td_warmup_steps > 0 else 1.0


def _weights(trajectories: Trajectories, options: BellmanOptions, *, dtype: torch.dtype) -> Tensor:
    if options.objective == "released":
        return released_weights(trajectories).to(dtype)
    return reduction_weights(trajectories, options.reduction)


def _eq17_terms(
    values: ActionValues,
    steps: Transitions,
    sets: CandidateSets,
    trajectories: Trajectories,
    options: BellmanOptions,
) -> tuple[Tensor, Tensor]:
    """Linear term and penalty of each state, nats."""
    if options.linear_term == "sampled":
        linear_S = negative_log_policy_taken(steps)
    else:
        log_teacher_M = projected_log_teacher(
            sets, dtype=values.q_M.dtype, wanted_by="--algo.distill.linear_term expected"
        )
        expected_S = negative_log_policy_expected(values.q_M, steps.value_S, sets, log_teacher_M)
        linear_S = torch.where(trajectories.has_action_S, expected_S, 0.0)
    td_S = reward_penalty(steps.reward_S, name=options.regulariser, alpha=options.alpha)
    student_S = trajectories.student_S
    if student_S is None:
        return linear_S, td_S
    return (
        torch.where(student_S, student_target(values, sets, options), linear_S),
        torch.where(student_S, student_penalty(td_S, values, steps, options), td_S),
    )


def _tail_states(weight_S: Tensor, trajectories: Trajectories, options: BellmanOptions) -> Tensor:
    """The weights, 0 where a state has no tail term."""
    student_S = trajectories.student_S
    return weight_S if student_S is None or options.student_tail else torch.where(student_S, 0.0, weight_S)


@torch.no_grad()
def _target_values(
    target_head: StudentHead | None,
    sets: CandidateSets,
    taken_S: Tensor,
    options: BellmanOptions,
    *,
    shift_constant: float | None,
    pull_S: Tensor | None,
) -> ActionValues | None:
    if target_head is None or options.next_value_gradient != "target":
        return None
    head = target_head.tempered(options.tau)
    z_M = head.at_candidates(sets)
    return action_values(head, z_M, sets, taken_S, options, shift_constant=shift_constant, pull_S=pull_S)


def _tail(
    head: StudentHead,
    z_M: Tensor,
    sets: CandidateSets,
    options: BellmanOptions,
    weight_S: Tensor,
    generator: Generator | None,
) -> WeightedTerm:
    """The tail term, summed with its weights (see StudentHead.tail); 0 where the options or the sets have none."""
    if options.tail_coef == 0 or sets.is_whole:
        return WeightedTerm(z_M.new_zeros(()), torch.zeros_like(weight_S))
    return head.tail(
        sets,
        segment_logsumexp(z_M, sets.state_M, sets.num_states),
        weight_S,
        estimator=options.tail_estimator,
        num_samples=options.tail_samples,
        tolerance=options.tail_tolerance,
        generator=generator,
    )


def _check_inputs(
    head: StudentHead, sets: CandidateSets, trajectories: Trajectories, options: BellmanOptions, denominator: float
) -> None:
    check_states(head, sets, trajectories, denominator)
    if sets.is_whole and options.top_p < 1:
        raise ConfigError(
            f"the candidate sets are the whole vocabulary (p = 1), and --algo.distill.top_p is {options.top_p}; use "
            "--algo.distill.top_p 1, or sets of that p"
        )
    if options.objective == "released" and trajectories.student_S is not None:
        raise ConfigError(
            "--algo.distill.objective released computes what the authors' code does, which has no rows that the "
            "student sampled, and some of these are; use --algo.distill.rollout teacher, or "
            "--algo.distill.objective eq17"
        )
