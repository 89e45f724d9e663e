"""MiniLLM's loss (Gu et al. 2024): the policy gradient of the reverse KL of whole responses, with lower variance.

With pi the student, pi* the teacher, mu the distribution that a token was sampled from (the student's at some earlier
step, mixed with the teacher's in teacher-mixed sampling) and rewards r_t = log pi*(a_t | s_t) - log pi(a_t | s_t):

    grad KL(pi || pi*) = E_pi sum_t { grad KL_t - (sum_{t' > t} r_t') grad log pi(a_t | s_t) }

The first part is the *single-step decomposition*: what the action at t itself brings is not sampled but summed over
all actions, KL_t = sum_a pi(a | s_t) log [pi(a | s_t) / pi*(a | s_t)], here over the candidates and one bucket (see
functional.divergences). The second is the *long part*. Tokens of mu count with importance weights:

    importance token     w_t = rho_t = pi(a_t | s_t) / mu(a_t | s_t)  for both parts, as the authors approximate
    importance sequence  KL_t with prod_{u < t} rho_u; the long part with prod_{u <= t} rho_u, and r_t' in it with
                         prod_{t < u <= t'} rho_u: the gradient of the objective whatever mu is, at a high variance

Each ratio but the one that has a gradient counts up to 1 + importance_clip, and the long part is PPO's: with the
advantage A_t = sum_{t' > t} r_t' it is -min(w_t A_t, clip(w_t, 1 - importance_clip, 1 + importance_clip) A_t). *Length
normalisation* makes A_t a mean over the tokens after t, so that long responses are not punished for being long. J_PT is
added as for every algorithm (student.loss).
"""

# S states, M candidates of all states

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.checks import check_states
from openrlhf_bd.functional.diagnostics import source_metrics, state_metrics
from openrlhf_bd.functional.divergence_loss import pair_metrics
from openrlhf_bd.functional.divergences import LOG_LEAST_CANDIDATE, Bucket, coarsened_pair, jensen_shannon
from openrlhf_bd.functional.head import StudentHead, weighted_term
from openrlhf_bd.functional.metrics import Metrics, weighted
from openrlhf_bd.functional.returns import earlier_sums, later_sums
from openrlhf_bd.functional.trajectories import Behaviour, Trajectories, reduction_weights
from openrlhf_bd.functional.values import taken_candidate

if TYPE_CHECKING:
    from openrlhf_bd.config import DistillConfig

MAX_LOG_WEIGHT = 20.0  # of a weight before it is clipped: far above any clip, far below float32's largest number


@dataclass(frozen=True)
class Weights:
    """What the sampled tokens count for. No gradient flows.

    Attributes:
        single_S: weight of the single-step part.
        log_before_S: log of what multiplies a token's own ratio in the long part, nats.
        advantage_S: A_t, nats; 0 at the last token of a response.
    """

    single_S: Tensor
    log_before_S: Tensor
    advantage_S: Tensor


def policy_gradient_loss(
    head: StudentHead,
    sets: CandidateSets,
    trajectories: Trajectories,
    options: DistillConfig,
    *,
    num_tokens: float,
    num_rows: float,
    stop_ids: Sequence[int] = (),
    full_diagnostics: bool = True,
) -> tuple[Tensor, Metrics]:
    """A loss whose gradient is MiniLLM's (formulas at the top of this module); its value has no meaning of its own.

    L = (1/N) sum_t { w_t KL_t - min(w_t A_t, clip(w_t) A_t) }

    Args:
        head: student's logits at the states. Gradient flows, through KL_t and through w_t of the long part.
        sets: the teacher's candidate sets at the same states, with log-probabilities.
        trajectories: the rows, with the behaviour that sampled them.
        options: importance, importance_clip, length_normalisation, reduction, tau.
        num_tokens: N, response tokens of the global batch, for options.reduction token.
        num_rows: rows of the global batch, for options.reduction sequence (the mean of per-row means).
        stop_ids: stop tokens, for the metric of their probability alone.
        full_diagnostics: also compute metrics that read all logits; without it they are there where they cost nothing.

    Returns:
        (loss, metrics): besides those of functional.diagnostics `advantage` (mean of A_t), `importance` (mean of the
        weight w_t, before it is clipped) and `clipped_rate` (tokens whose long part has no gradient for the clip).

    Raises:
        ConfigError: the sets have no log-probabilities.
        ValueError: rows without a behaviour, numbers of states that differ, or a count that is not positive.
    """
    denominator = num_tokens if options.reduction == "token" else num_rows
    check_states(head, sets, trajectories, denominator)
    behaviour = _behaviour(trajectories)
    head = head.tempered(options.tau)
    z_M = head.at_candidates(sets)
    pair, bucket = coarsened_pair(head, z_M, sets, wanted_by=f"--algo.distill.name {options.name}")
    log_policy_S = _log_policy(head, bucket, trajectories)
    weights = _weights(log_policy_S.detach(), trajectories, behaviour, options)

    log_ratio_S = weights.log_before_S + log_policy_S - behaviour.logprob_S.to(log_policy_S.dtype)
    ratio_S = torch.exp(log_ratio_S.clamp(max=MAX_LOG_WEIGHT))
    clip = options.importance_clip
    free_S, held_S = ratio_S * weights.advantage_S, ratio_S.clamp(1.0 - clip, 1.0 + clip) * weights.advantage_S
    weight_S = reduction_weights(trajectories, options.reduction)
    single_S = weights.single_S * jensen_shannon(pair, 1.0)
    term = weighted_term(single_S - torch.minimum(free_S, held_S), weight_S)

    action_S = trajectories.has_action_S
    metrics = {
        "policy_loss": weighted(term.value_S, weight_S),
        "advantage": weighted(weights.advantage_S, action_S),
        "importance": weighted(ratio_S.detach(), action_S),
        "clipped_rate": weighted(held_S.detach() < free_S.detach(), action_S),
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


def _behaviour(trajectories: Trajectories) -> Behaviour:
    if trajectories.behaviour is None:
        raise ValueError(
            "rows without the log-probabilities under which they were sampled: minillm weighs every token by them; use "
            "--algo.distill.mode online, or a store that an online run left"
        )
    return trajectories.behaviour


def _log_policy(head: StudentHead, bucket: Bucket, trajectories: Trajectories) -> Tensor:
    """log pi(a_t | s_t), [S] nats, at least LOG_LEAST_CANDIDATE; 0 where a state has no action. Gradient flows."""
    log_policy_S = (head.at(trajectories.taken_S) - bucket.logsumexp_S).clamp(min=LOG_LEAST_CANDIDATE)
    return torch.where(trajectories.has_action_S, log_policy_S, 0.0)


@torch.no_grad()
def _weights(log_policy_S: Tensor, trajectories: Trajectories, behaviour: Behaviour, options: DistillConfig) -> Weights:
    action_S, next_S, dtype = trajectories.has_action_S, trajectories.next_S, log_policy_S.dtype
    # Sums over long responses in float64.
    log_policy_S = log_policy_S.double()
    log_ratio_S = torch.where(action_S, log_policy_S - behaviour.logprob_S.double(), 0.0)
    log_ratio_S = log_ratio_S.clamp(max=math.log1p(options.importance_clip))
    teacher_S = behaviour.teacher_logprob_S.double().clamp(min=LOG_LEAST_CANDIDATE)
    reward_S = torch.where(action_S, teacher_S - log_policy_S, 0.0)

    by_token = options.importance == "token"
    ones_S = torch.ones_like(reward_S)
    log_before_S = torch.zeros_like(reward_S) if by_token else earlier_sums(log_ratio_S, next_S)
    advantage_S = later_sums(reward_S, ones_S if by_token else log_ratio_S.exp(), next_S)
    if options.length_normalisation:
        advantage_S = advantage_S / later_sums(action_S.double(), ones_S, next_S).clamp(min=1.0)
    single_S = log_ratio_S.exp() if by_token else log_before_S.clamp(max=MAX_LOG_WEIGHT).exp()
    return Weights(single_S.to(dtype), log_before_S.to(dtype), advantage_S.to(dtype))
