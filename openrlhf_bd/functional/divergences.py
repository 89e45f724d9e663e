"""Divergences between student and teacher over candidate sets: what gkd, rkl and minillm match at each state.

The teacher's distribution is known on the candidates, and beside them as one number: the mass of all other tokens. So
student and teacher are compared over the candidates and one bucket for the rest. Putting tokens together lowers every
divergence here (it is an f-divergence): what is computed is at most the divergence over the whole vocabulary, and that
itself where a set is the vocabulary. Or both policies are projected on the candidates (Def. 3), which needs no pass
over the vocabulary and sees no logit outside the sets.
"""

# S states, M candidates of all states

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.segments import segment_logsumexp, segment_sum
from openrlhf_bd.functional.values import projected_log_policy, projected_log_teacher

NEG_INF = float("-inf")
# A store keeps -log of the mass in float16: a rest below half of 2^-24, the least number above 0, comes back as 0.
LOG_LEAST_REST = -25 * math.log(2)
LOG_LEAST_CANDIDATE = -100.0  # in the place of a candidate's probability 0, where a reverse KL would be infinite


@dataclass(frozen=True)
class Bucket:
    """All tokens of each state that are no candidates, together.

    Attributes:
        student_S: the student's log-probability, nats. Gradient flows.
        teacher_S: the teacher's, nats.
        logsumexp_S: log sum exp of the student's logits over the vocabulary, nats. Gradient flows.
    """

    student_S: Tensor
    teacher_S: Tensor
    logsumexp_S: Tensor


@dataclass(frozen=True)
class PolicyPair:
    """Student and teacher at each state, as log-probabilities that sum to 1 over the candidates and the bucket.

    Attributes:
        student_M: of each candidate, nats. Gradient flows.
        teacher_M: of each candidate, nats.
        sets: the candidate sets.
        bucket: what the policies have beside the candidates; None where they are projected.
    """

    student_M: Tensor
    teacher_M: Tensor
    sets: CandidateSets
    bucket: Bucket | None


def projected_pair(z_M: Tensor, sets: CandidateSets, *, wanted_by: str) -> PolicyPair:
    """Both policies projected on the candidates: exp z / sum_A exp z, and the teacher's likewise.

    Args:
        z_M: the student's logits at the candidates. Gradient flows.
        sets: candidate sets with log-probabilities.
        wanted_by: flag that asks for them, for the message.

    Raises:
        ConfigError: the sets have no log-probabilities.
    """
    inside_S = segment_logsumexp(z_M, sets.state_M, sets.num_states)
    teacher_M = _log_teacher(sets, z_M.dtype, wanted_by)
    return PolicyPair(projected_log_policy(z_M, inside_S, sets.state_M), teacher_M, sets, None)


def coarsened_pair(head: StudentHead, z_M: Tensor, sets: CandidateSets, *, wanted_by: str) -> tuple[PolicyPair, Bucket]:
    """Both policies over the candidates and one bucket, and that bucket.

    Mass inside and outside are sigmoids of the difference of the two log-sum-exps, as in functional.tail: 1 minus the
    one would vanish in float32. The pass over the vocabulary that gives the outside one gives the statistics too.

    Args:
        head: the student's logits. Gradient flows.
        z_M: the same at the candidates (`head.at_candidates(sets)`).
        sets: candidate sets with log-probabilities.
        wanted_by: flag that asks for them, for the message.

    Raises:
        ConfigError: the sets have no log-probabilities.
    """
    dtype, state_M = z_M.dtype, sets.state_M
    teacher_M = _log_teacher(sets, dtype, wanted_by)
    neg_log_mass_S = sets.neg_log_mass_S.to(dtype)
    inside_S = segment_logsumexp(z_M, state_M, sets.num_states)
    outside_S = head.logsumexp_outside(sets)
    log_inside_S, log_outside_S = logsigmoid(inside_S - outside_S), logsigmoid(outside_S - inside_S)
    rest_S = torch.log(-torch.expm1(-neg_log_mass_S)).clamp(min=LOG_LEAST_REST)
    # A set that holds every token has an empty bucket, whatever rounding left of the teacher's mass.
    everything_S = outside_S == NEG_INF
    bucket = Bucket(
        torch.where(everything_S, NEG_INF, log_outside_S),
        torch.where(everything_S, NEG_INF, rest_S),
        torch.logaddexp(inside_S, outside_S),
    )
    student_M = projected_log_policy(z_M, inside_S, state_M) + log_inside_S[state_M]
    return PolicyPair(student_M, teacher_M - neg_log_mass_S[state_M], sets, bucket), bucket


def jensen_shannon(pair: PolicyPair, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of each state (Agarwal et al. 2024), with the two KLs at its ends.

    JSD_beta = beta KL(teacher || m) + (1 - beta) KL(student || m),   m = beta teacher + (1 - beta) student
    beta = 0: KL(teacher || student), forward;   beta = 1: KL(student || teacher), reverse

    The ends are those of TRL's GKD trainer. JSD_beta itself goes to 0 there: the KLs are the limits of JSD_beta / beta
    and JSD_beta / (1 - beta), so the loss jumps at either end.

    Args:
        pair: the two policies. Gradient flows to the student's.
        beta: in [0, 1].

    Returns:
        [S], nats, >= 0; +inf for beta = 0 where the student rules out what the teacher does not.
    """
    state_M, num_states = pair.sets.state_M, pair.sets.num_states
    total_S = segment_sum(_jensen_shannon_terms(pair.teacher_M, pair.student_M, beta), state_M, num_states)
    if pair.bucket is None:
        return total_S
    return total_S + _jensen_shannon_terms(pair.bucket.teacher_S, pair.bucket.student_S, beta)


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q) of each element, whose sum is KL(p || q); 0, without gradient, where p = 0."""
    impossible = log_p == NEG_INF
    safe_log_p = torch.where(impossible, 0.0, log_p)
    gap = safe_log_p - torch.where(impossible, 0.0, log_q)
    return torch.where(impossible, 0.0, torch.exp(safe_log_p) * gap)


def _jensen_shannon_terms(log_teacher: Tensor, log_student: Tensor, beta: float) -> Tensor:
    if beta == 0.0:
        return kl_terms(log_teacher, log_student)
    if beta == 1.0:
        return kl_terms(log_student, log_teacher)
    # Where both are impossible (an empty bucket) a sum of exponentials has no gradient.
    nothing = (log_teacher == NEG_INF) & (log_student == NEG_INF)
    log_mixture = torch.logaddexp(
        torch.where(nothing, 0.0, log_teacher + math.log(beta)),
        torch.where(nothing, 0.0, log_student + math.log1p(-beta)),
    )
    return beta * kl_terms(log_teacher, log_mixture) + (1.0 - beta) * kl_terms(log_student, log_mixture)


def _log_teacher(sets: CandidateSets, dtype: torch.dtype, wanted_by: str) -> Tensor:
    return projected_log_teacher(sets, dtype=dtype, wanted_by=wanted_by).clamp(min=LOG_LEAST_CANDIDATE)
