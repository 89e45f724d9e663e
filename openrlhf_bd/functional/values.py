"""Q, soft values, projected policies and implied rewards over candidate sets."""

# S states, M candidates of all states

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openrlhf_bd.config import BellmanOptions
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.segments import segment_argmax, segment_logsumexp, segment_max, segment_sum
from openrlhf_bd.functional.trajectories import Trajectories

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Transitions:
    """One step of every state: s_t, a_t, r_t, s_{t+1}. Entries without a meaning are 0, never NaN.

    Attributes:
        value_S: soft value V of each state, nats.
        q_taken_S: Q of the taken token (as `out_of_set` says where it is not a candidate), nats.
        in_set_S: True where the taken token is a candidate.
        used_S: u_t: True where the taken token counts in the sampled terms.
        has_next_S: d_t: True where a next value exists.
        next_value_S: V', nats.
        reward_S: r = Q - gamma V', nats; meaningful where used_S and has_next_S.
    """

    value_S: Tensor
    q_taken_S: Tensor
    in_set_S: Tensor
    used_S: Tensor
    has_next_S: Tensor
    next_value_S: Tensor
    reward_S: Tensor


def soft_value(q_M: Tensor, state_M: Tensor, num_states: int) -> Tensor:
    """Soft value of each state over its candidate set.

    V(s) = log sum_{a in A_p(s)} exp Q(s, a)        (V^{proj_p pi_Q}, below Eq. 17)

    Args:
        q_M: Q of every candidate, nats. Gradient flows.
        state_M: state of each candidate, int64 in [0, num_states).
        num_states: S.

    Returns:
        [S], nats; -inf where a state has no candidate above -inf.
    """
    return segment_logsumexp(q_M, state_M, num_states)


def projected_log_policy(q_M: Tensor, value_S: Tensor, state_M: Tensor) -> Tensor:
    """Log-probabilities of the projected policy (Def. 3).

    log pibar(a | s) = Q(s, a) - V(s)

    Args:
        q_M: Q of every candidate, nats. Gradient flows.
        value_S: soft values, nats. Gradient flows.
        state_M: state of each candidate.

    Returns:
        [M], nats; -inf where Q is.
    """
    return _difference(q_M, value_S[state_M])


def q_values(
    z_M: Tensor,
    head: StudentHead,
    sets: CandidateSets,
    options: BellmanOptions,
    *,
    shift_constant: float | None,
) -> tuple[Tensor, Tensor]:
    """Q of every candidate from the student's logits.

    Q(s, a) = max(z(s, a) - b(s), Q_min)

    b, by options.q_shift: none 0; constant `shift_constant`; max and max_detached: max over the vocabulary;
    topp_max: max over the candidates; logsumexp: over the vocabulary.

    Args:
        z_M: logits / tau at the candidates. Gradient flows, also through b, except for none, constant, max_detached.
        head: the student's logits / tau.
        sets: candidate sets.
        options: q_shift and q_min.
        shift_constant: nats; the run's constant.

    Returns:
        (q_M, clipped_M): Q, nats, and where the clip holds it (no gradient there).

    Raises:
        ConfigError: q_shift is constant and shift_constant is None.
    """
    shift_S = _shift(z_M, head, sets, options, shift_constant)
    q_M = z_M if shift_S is None else z_M - shift_S[sets.state_M]
    if options.q_min is None:
        return q_M, torch.zeros_like(q_M, dtype=torch.bool)
    return q_M.clamp(min=options.q_min), q_M.detach() < options.q_min


def projected_teacher(sets: CandidateSets, *, dtype: torch.dtype) -> Tensor:
    """Probabilities of the projected teacher (Def. 3), from the stored log-probabilities.

    pi*(a | s) / sum_{b in A_p(s)} pi*(b | s)

    Args:
        sets: candidate sets with log-probabilities.
        dtype: type of the result.

    Returns:
        [M]; each state's sum to 1. No gradient.

    Raises:
        ConfigError: the sets have no log-probabilities.
    """
    if sets.logprobs_M is None:
        raise ConfigError(
            "the candidate sets have no log-probabilities, which --algo.distill.linear_term expected needs; record "
            "them (--teacher.record_logprobs true) or use --algo.distill.linear_term sampled"
        )
    logprobs_M = sets.logprobs_M.to(dtype)
    log_mass_S = segment_logsumexp(logprobs_M, sets.state_M, sets.num_states)
    return torch.exp(_difference(logprobs_M, log_mass_S[sets.state_M]))


def taken_candidate(sets: CandidateSets, taken_S: Tensor) -> Tensor:
    """Position in ids_M of each state's taken token.

    Args:
        sets: candidate sets.
        taken_S: token taken in each state, -1 for none.

    Returns:
        [S] int64; -1 where the token is not a candidate.
    """
    position_M = torch.arange(sets.num_candidates, device=taken_S.device)
    position_M = torch.where(sets.ids_M == taken_S[sets.state_M], position_M, -1)
    return segment_max(position_M, sets.state_M, sets.num_states, initial=-1)


def transitions(q_M: Tensor, sets: CandidateSets, trajectories: Trajectories, options: BellmanOptions) -> Transitions:
    """Values, next values and implied rewards of every state.

    r_t = Q_t(a_t) - gamma V'_t,    V'_t = V_{t+1}

    After a stop token, by options.terminal: zero V' = 0; drop_chi no next value; absorbing: the stop action repeats
    for ever in a state where it is the only one, so V' = Q_t(a_t) and r = (1 - gamma) Q_t(a_t).
    Where the response was cut, by options.truncated: bootstrap V_{t+1} where that state was recorded, or drop it.

    Args:
        q_M: Q of every candidate, nats. Gradient flows, through V' only if options.next_value_gradient is full.
        sets: candidate sets.
        trajectories: what follows what.
        options: gamma, out_of_set, q_min, terminal, truncated, next_value_gradient.

    Returns:
        Transitions.
    """
    value_S = soft_value(q_M, sets.state_M, sets.num_states)
    position_S = taken_candidate(sets, trajectories.taken_S)
    in_set_S = position_S >= 0
    q_taken_S = torch.where(in_set_S, q_M[position_S.clamp(min=0)], _out_of_set_q(options))
    used_S = in_set_S if options.out_of_set == "drop" else trajectories.has_action_S

    next_S, terminal_S = trajectories.next_S, trajectories.terminal_S
    has_next_S = trajectories.has_action_S & (next_S >= 0)
    if options.truncated == "drop":
        has_next_S &= trajectories.has_action_S[next_S.clamp(min=0)]
    next_value_S = torch.where(has_next_S, value_S[next_S.clamp(min=0)], 0.0)
    if options.terminal == "absorbing":
        next_value_S = torch.where(terminal_S, q_taken_S, next_value_S)
    if options.terminal != "drop_chi":
        has_next_S = has_next_S | terminal_S
    if options.next_value_gradient == "stop":
        next_value_S = next_value_S.detach()
    # gamma = 0 times a value of -inf would be NaN.
    discounted_S = options.gamma * next_value_S if options.gamma > 0 else torch.zeros_like(next_value_S)
    reward_S = torch.where(used_S & has_next_S, q_taken_S - discounted_S, 0.0)
    return Transitions(value_S, q_taken_S, in_set_S, used_S, has_next_S, next_value_S, reward_S)


def negative_log_policy_taken(steps: Transitions) -> Tensor:
    """-log pibar(a_t | s_t) = -Q_t(a_t) + V_t, the sampled linear term, [S] nats; 0 where u_t = 0."""
    return torch.where(steps.used_S, -_difference(steps.q_taken_S, steps.value_S), 0.0)


def negative_log_policy_expected(q_M: Tensor, value_S: Tensor, sets: CandidateSets) -> Tensor:
    """Expectation of the sampled linear term under the teacher, out-of-set tokens dropped, [S] nats.

    P_t sum_{a in A_t} proj_p pi*(a) [-Q_t(a) + V_t],  P_t the teacher's mass on A_t
    """
    weight_M = projected_teacher(sets, dtype=q_M.dtype)
    log_policy_M = projected_log_policy(q_M, value_S, sets.state_M)
    term_M = torch.where(weight_M > 0, weight_M * -log_policy_M, 0.0)
    return teacher_mass(sets, dtype=q_M.dtype) * segment_sum(term_M, sets.state_M, sets.num_states)


def teacher_mass(sets: CandidateSets, *, dtype: torch.dtype) -> Tensor:
    """P_t, the teacher's mass on each set, [S]."""
    return torch.exp(-sets.neg_log_mass_S.to(dtype))


def _difference(x: Tensor, level: Tensor) -> Tensor:
    """x - level, and -inf (not NaN) where both are -inf."""
    return torch.where(x == NEG_INF, NEG_INF, x - level)


def _out_of_set_q(options: BellmanOptions) -> float:
    if options.out_of_set == "clip":
        if options.q_min is None:
            raise ConfigError("--algo.distill.out_of_set clip needs a value to clip at: set --algo.distill.q_min")
        return options.q_min
    return 0.0


def _shift(
    z_M: Tensor, head: StudentHead, sets: CandidateSets, options: BellmanOptions, shift_constant: float | None
) -> Tensor | None:
    if options.q_shift == "none":
        return None
    if options.q_shift == "constant":
        if shift_constant is None:
            raise ConfigError(
                "--algo.distill.q_shift constant needs the run's constant, the mean log-sum-exp of the starting "
                "student's logits; none was given"
            )
        return z_M.new_full((sets.num_states,), shift_constant)
    if options.q_shift == "max":
        shift_S = head.maximum()
    elif options.q_shift == "max_detached":
        shift_S = head.maximum().detach()
    elif options.q_shift == "logsumexp":
        shift_S = head.logsumexp()
    else:
        position_S = segment_argmax(z_M, sets.state_M, sets.num_states)
        shift_S = torch.where(position_S >= 0, z_M[position_S.clamp(min=0)], NEG_INF)
    # -inf - (-inf) would be NaN where a whole set has no finite logit.
    return torch.where(shift_S == NEG_INF, 0.0, shift_S)
