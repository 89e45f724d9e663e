"""Metrics of the Bellman Distill loss: what to watch while a student trains. No gradient flows.

The student's policy is softmax(z / tau) throughout. Means are over states with an action unless said otherwise. What is
there: always; "sets": unless the sets are the whole vocabulary (p = 1); "full": where the statistics of the student's
whole distribution are wanted, or free.

| name | mean of | there |
| --- | --- | --- |
| policy_loss, linear_loss, td_loss, tail_loss | the loss and its parts, which add up; per token or row | always |
| td_share | td_loss over policy_loss | always |
| value | soft value V | always |
| reward, reward_end | implied reward r, where it exists; the same after the stop token | always |
| clip_rate | candidates at Q_min | sets |
| out_of_set_rate | taken tokens that are not candidates | sets |
| teacher_mass | P: the teacher's probability of the set | sets |
| set_size, one_token_sets | candidates of a set; sets of a single one | sets |
| set_size_at_most_k | sets of at most k = 1, 2, 4, ...; they become set_size_p50, _p90, _p99 | sets |
| logsumexp, logsumexp_second_moment | log-sum-exp of the logits, for its level and spread | full |
| entropy | entropy of the student | full |
| nll | -log of the student's probability of the taken token | full |
| stop_prob, stop_prob_end | the student's probability of the stop tokens; the same where the teacher stopped | full |
| student_mass | P_theta: the student's probability of the set | sets, full |
| top1_overlap | states where the student's most probable token is the teacher's | sets, full |
"""

# S states, M candidates of all states

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import HeadStatistics, StudentHead, end_log_prob
from openrlhf_bd.functional.metrics import SECOND_MOMENT, Metrics, at_most, weighted
from openrlhf_bd.functional.segments import segment_logsumexp
from openrlhf_bd.functional.trajectories import Trajectories
from openrlhf_bd.functional.values import Transitions, teacher_mass


@dataclass(frozen=True)
class LossParts:
    """Terms of the loss at each state, nats, and the weight of each state in the sum. The tail has its coefficient."""

    linear_S: Tensor
    td_S: Tensor
    tail_S: Tensor
    weight_S: Tensor


@torch.no_grad()
def bellman_diagnostics(
    head: StudentHead,
    sets: CandidateSets,
    trajectories: Trajectories,
    z_M: Tensor,
    clipped_M: Tensor,
    steps: Transitions,
    parts: LossParts,
    *,
    stop_ids: Sequence[int],
    full: bool,
) -> Metrics:
    """Metrics of the table of this module, as (sum, weight).

    Args:
        head: student's logits / tau.
        sets: candidate sets.
        trajectories: taken tokens.
        z_M: logits / tau at the candidates.
        clipped_M: candidates at Q_min.
        steps: values and rewards.
        parts: terms of the loss.
        stop_ids: stop tokens; none: no stop_prob.
        full: all of them; False: those that read the whole vocabulary only where the head has done so already.
    """
    metrics = {**_loss_metrics(parts), **_value_metrics(trajectories, steps)}
    if not sets.is_whole:
        metrics |= _set_metrics(sets, trajectories, steps, clipped_M)
    if full or head.statistics_are_free:
        statistics = head.statistics()
        metrics |= _student_metrics(head, statistics, trajectories, stop_ids)
        if not sets.is_whole:
            metrics |= _student_set_metrics(statistics, sets, trajectories, z_M)
    return metrics


def _loss_metrics(parts: LossParts) -> Metrics:
    total_S = parts.linear_S + parts.td_S + parts.tail_S
    metrics = {
        "policy_loss": weighted(total_S, parts.weight_S),
        "linear_loss": weighted(parts.linear_S, parts.weight_S),
        "td_loss": weighted(parts.td_S, parts.weight_S),
        "tail_loss": weighted(parts.tail_S, parts.weight_S),
    }
    return {**metrics, "td_share": (metrics["td_loss"][0], metrics["policy_loss"][0])}


def _value_metrics(trajectories: Trajectories, steps: Transitions) -> Metrics:
    rewarded_S = steps.used_S & steps.has_next_S
    return {
        "value": weighted(steps.value_S, trajectories.has_action_S),
        "reward": weighted(steps.reward_S, rewarded_S),
        "reward_end": weighted(steps.reward_S, rewarded_S & trajectories.terminal_S),
    }


def _set_metrics(sets: CandidateSets, trajectories: Trajectories, steps: Transitions, clipped_M: Tensor) -> Metrics:
    action_S = trajectories.has_action_S
    return {
        "out_of_set_rate": weighted(~steps.in_set_S, action_S),
        "clip_rate": weighted(clipped_M, action_S[sets.state_M]),
        "teacher_mass": weighted(teacher_mass(sets, dtype=torch.float64), action_S),
        "set_size": weighted(sets.sizes_S, action_S),
        "one_token_sets": weighted(sets.sizes_S == 1, action_S),
        **at_most("set_size", sets.sizes_S, action_S),
    }


def _student_metrics(
    head: StudentHead, statistics: HeadStatistics, trajectories: Trajectories, stop_ids: Sequence[int]
) -> Metrics:
    action_S, logsumexp_S = trajectories.has_action_S, statistics.logsumexp_S
    metrics = {
        "logsumexp": weighted(logsumexp_S, action_S),
        f"logsumexp{SECOND_MOMENT}": weighted(logsumexp_S.double().square(), action_S),
        "entropy": weighted(statistics.entropy_S, action_S),
        "nll": weighted(logsumexp_S - head.at(trajectories.taken_S), action_S),
    }
    if stop_ids:
        stop_prob_S = torch.exp(end_log_prob(head, statistics, stop_ids))
        metrics["stop_prob"] = weighted(stop_prob_S, action_S)
        metrics["stop_prob_end"] = weighted(stop_prob_S, trajectories.terminal_S)
    return metrics


def _student_set_metrics(
    statistics: HeadStatistics, sets: CandidateSets, trajectories: Trajectories, z_M: Tensor
) -> Metrics:
    action_S = trajectories.has_action_S
    inside_S = segment_logsumexp(z_M, sets.state_M, sets.num_states)
    teacher_top1_S = sets.ids_M[sets.offsets_S1[:-1]]
    return {
        "student_mass": weighted(torch.exp(inside_S - statistics.logsumexp_S), action_S),
        "top1_overlap": weighted(statistics.argmax_S == teacher_top1_S, action_S),
    }
