"""Metrics of the losses over candidate sets: what to watch while a student trains. No gradient flows.

The student's policy is softmax(z / tau) throughout. Means are over states with an action unless said otherwise. What is
there: always; "sets": unless the sets are the whole vocabulary (p = 1); "full": where the statistics of the student's
whole distribution are wanted, or free.

| name | mean of | there |
| --- | --- | --- |
| policy_loss | the loss; per token or row | always |
| linear_loss, td_loss, tail_loss | its parts, which add up | bd, kd |
| td_share | td_loss over policy_loss | bd, kd |
| value | soft value V | bd, kd |
| reward, reward_end | implied reward r, where it exists; the same after the stop token | bd, kd |
| clip_rate | candidates at Q_min | bd, kd: sets |
| forward_kl, reverse_kl | KL(teacher, student) and KL(student, teacher), over what the divergence is over | others |
| advantage, importance, clipped_rate | see functional.policy_gradient | minillm |
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

In an online run's rows some are there once more by source, as teacher/NAME and student/NAME: policy_loss,
out_of_set_rate, td_loss and reward (bd, kd), reverse_kl (others). Of the student's rows alone:

| name | mean of | there |
| --- | --- | --- |
| student/share | the student's tokens among all: the beta that a batch realises | online |
| student/teacher_nll | -log of the teacher's probability of the student's tokens | online |
| student/sampled_kl | log behaviour - log teacher of the student's tokens: reverse KL as sampled | online |
| student/log_ratio | log student - log behaviour of the student's tokens: its move since | online, full |
"""

# S states, M candidates of all states

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    @property
    def total_S(self) -> Tensor:
        return self.linear_S + self.td_S + self.tail_S


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
    by_source = {
        "policy_loss": (parts.total_S, parts.weight_S),
        "td_loss": (parts.td_S, parts.weight_S),
        "reward": (steps.reward_S, steps.used_S & steps.has_next_S),
    }
    metrics = {**_loss_metrics(parts), **_value_metrics(trajectories, steps), **source_metrics(trajectories, by_source)}
    if not sets.is_whole:
        metrics["clip_rate"] = weighted(clipped_M, trajectories.has_action_S[sets.state_M])
    return metrics | state_metrics(head, sets, trajectories, z_M, steps.in_set_S, stop_ids=stop_ids, full=full)


@torch.no_grad()
def state_metrics(
    head: StudentHead,
    sets: CandidateSets,
    trajectories: Trajectories,
    z_M: Tensor,
    in_set_S: Tensor,
    *,
    stop_ids: Sequence[int],
    full: bool,
) -> Metrics:
    """What does not depend on the loss: of the sets, of the student's distribution, of who sampled what.

    Args:
        in_set_S: True where the taken token is a candidate.
        head, sets, trajectories, z_M, stop_ids, full: as in bellman_diagnostics.
    """
    metrics: Metrics = {}
    if not sets.is_whole:
        metrics |= _set_metrics(sets, trajectories, in_set_S)
    behaviour = trajectories.behaviour
    if behaviour is not None:
        action_S, own_S = trajectories.has_action_S, behaviour.is_student_S
        metrics["student/share"] = weighted(own_S, action_S)
        metrics["student/teacher_nll"] = weighted(-behaviour.teacher_logprob_S, own_S)
        metrics["student/sampled_kl"] = weighted(behaviour.logprob_S - behaviour.teacher_logprob_S, own_S)
    if full or head.statistics_are_free:
        statistics = head.statistics()
        metrics |= _student_metrics(head, statistics, trajectories, stop_ids)
        if not sets.is_whole:
            metrics |= _student_set_metrics(statistics, sets, trajectories, z_M)
    return metrics


@torch.no_grad()
def source_metrics(trajectories: Trajectories, values: Mapping[str, tuple[Tensor, Tensor]]) -> Metrics:
    """Each value's mean over the teacher's and over the student's rows; nothing where rows have no source.

    Args:
        trajectories: whose rows are whose.
        values: name -> (values, weights) of the states.
    """
    if trajectories.behaviour is None:
        return {}
    own_S = trajectories.behaviour.is_student_S
    metrics: Metrics = {}
    for name, (x_S, weight_S) in values.items():
        metrics[f"teacher/{name}"] = weighted(x_S, torch.where(own_S, 0, weight_S))
        metrics[f"student/{name}"] = weighted(x_S, torch.where(own_S, weight_S, 0))
    return metrics


def _loss_metrics(parts: LossParts) -> Metrics:
    metrics = {
        "policy_loss": weighted(parts.total_S, parts.weight_S),
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


def _set_metrics(sets: CandidateSets, trajectories: Trajectories, in_set_S: Tensor) -> Metrics:
    action_S = trajectories.has_action_S
    return {
        "out_of_set_rate": weighted(~in_set_S, action_S),
        **source_metrics(trajectories, {"out_of_set_rate": (~in_set_S, action_S)}),
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
    if trajectories.behaviour is not None:
        log_policy_S = head.at(trajectories.taken_S) - logsumexp_S
        own_S = trajectories.behaviour.is_student_S
        metrics["student/log_ratio"] = weighted(log_policy_S - trajectories.behaviour.logprob_S, own_S)
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
