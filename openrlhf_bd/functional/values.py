"""Q, soft values, projected policies and implied rewards over candidate sets, or over the whole vocabulary (p = 1)."""

# S states, M candidates of all states

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.segments import segment_argmax, segment_logsumexp, segment_max, segment_sum
from openrlhf_bd.functional.trajectories import Trajectories

if TYPE_CHECKING:
    from openrlhf_bd.config import BellmanOptions

NEG_INF = float("-inf")


@dataclass(frozen=True)
class ActionValues:
    """Q of a state's actions, and its soft value. Gradient flows.

    Attributes:
        q_M: Q of every candidate, nats; no entry where the sets are the whole vocabulary.
        clipped_M: True where Q_min holds a candidate (no gradient there).
        value_S: soft value V of each state, nats.
        q_taken_S: Q of the taken token, nats; 0 where it is neither a candidate nor pulled.
        in_set_S: True where the taken token is a candidate.
        pulled_S: True where it is none, and its reward is to be pulled down (student_rows.pulled_actions).
    """

    q_M: Tensor
    clipped_M: Tensor
    value_S: Tensor
    q_taken_S: Tensor
    in_set_S: Tensor
    pulled_S: Tensor


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


def action_values(
    head: StudentHead,
    z_M: Tensor,
    sets: CandidateSets,
    taken_S: Tensor,
    options: BellmanOptions,
    *,
    shift_constant: float | None,
    pull_S: Tensor | None = None,
) -> ActionValues:
    """Q, soft values and the taken tokens' Q, over the candidate sets.

    Q(s, a) = max(z(s, a) - b(s), Q_min),    V(s) = log sum_{a in A_p(s)} exp Q(s, a)

    b, by options.q_shift: none 0; constant `shift_constant`; max and max_detached: max over the vocabulary;
    topp_max: max over the candidates; logsumexp: over the vocabulary. Where the sets are the whole vocabulary (p = 1),
    V is a sum over all of it, which the head takes in chunks.

    Args:
        head: the student's logits / tau. Gradient flows, also through b, except for none, constant, max_detached.
        z_M: the same at the candidates (`head.at_candidates(sets)`).
        sets: candidate sets.
        taken_S: token taken in each state, -1 for none.
        options: q_shift and q_min.
        shift_constant: nats; the run's constant.
        pull_S: True where the taken token's Q is wanted although it may be no candidate; None: nowhere.

    Raises:
        ConfigError: q_shift is constant and shift_constant is None.
    """
    shift_S = _shift(z_M, head, sets, options, shift_constant)
    if sets.is_whole:
        q_taken_S, _ = _clipped(_shifted(head.at(taken_S), shift_S), options.q_min)
        in_set_S = taken_S >= 0
        nothing_M = z_M.new_zeros(0)
        return ActionValues(
            nothing_M,
            nothing_M.bool(),
            head.soft_value(shift_S, options.q_min),
            torch.where(in_set_S, q_taken_S, 0.0),
            in_set_S,
            torch.zeros_like(in_set_S),
        )
    q_M, clipped_M = _clipped(_shifted(z_M, None if shift_S is None else shift_S[sets.state_M]), options.q_min)
    position_S = taken_candidate(sets, taken_S)
    in_set_S = position_S >= 0
    q_taken_S = torch.where(in_set_S, q_M[position_S.clamp(min=0)], 0.0)
    pulled_S = torch.zeros_like(in_set_S) if pull_S is None else pull_S & ~in_set_S & (taken_S >= 0)
    if pull_S is not None:
        q_pulled_S, _ = _clipped(_shifted(head.at(torch.where(pulled_S, taken_S, -1)), shift_S), options.q_min)
        pulled_S &= q_pulled_S != NEG_INF  # what the student rules out is as low as can be
        q_taken_S = torch.where(pulled_S, q_pulled_S, q_taken_S)
    return ActionValues(q_M, clipped_M, soft_value(q_M, sets.state_M, sets.num_states), q_taken_S, in_set_S, pulled_S)


def projected_log_teacher(sets: CandidateSets, *, dtype: torch.dtype, wanted_by: str) -> Tensor:
    """Log-probabilities of the projected teacher (Def. 3), from the stored ones.

    log pi*(a | s) - log sum_{b in A_p(s)} pi*(b | s)

    Args:
        sets: candidate sets with log-probabilities.
        dtype: type of the result.
        wanted_by: flag that asks for them, with its value, for the message.

    Returns:
        [M], nats; -inf where the teacher's probability is 0. No gradient.

    Raises:
        ConfigError: the sets have no log-probabilities.
    """
    if sets.logprobs_M is None:
        raise ConfigError(
            f"the candidate sets have no log-probabilities, which {wanted_by} needs; record them "
            "(--teacher.record_logprobs true, --algo.distill.top_p below 1), or change that option"
        )
    logprobs_M = sets.logprobs_M.to(dtype)
    log_mass_S = segment_logsumexp(logprobs_M, sets.state_M, sets.num_states)
    return _difference(logprobs_M, log_mass_S[sets.state_M])


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


def transitions(
    values: ActionValues,
    trajectories: Trajectories,
    options: BellmanOptions,
    *,
    target_values: ActionValues | None = None,
) -> Transitions:
    """Values, next values and implied rewards of every state.

    r_t = Q_t(a_t) - gamma V'_t,    V'_t = V_{t+1}

    After a stop token, by options.terminal: zero V' = 0; drop_chi no next value; absorbing: the stop action repeats
    for ever in a state where it is the only one, so V' = Q_t(a_t) and r = (1 - gamma) Q_t(a_t).
    Where the response was cut, by options.truncated: bootstrap V_{t+1} where that state was recorded, or drop it.
    With options.next_value_gradient target, V' is the target network's, and so is Q_t(a_t) in it.
    options.out_of_set concerns the teacher's rows; of the student's, a token outside its set counts only where pulled.

    Args:
        values: the student's Q and V. Gradient flows, through V' only if options.next_value_gradient is full.
        trajectories: what follows what.
        options: gamma, out_of_set, q_min, terminal, truncated, next_value_gradient.
        target_values: the target network's Q and V at the same states, for next_value_gradient target.

    Raises:
        ConfigError: next_value_gradient is target and there are no target_values.
    """
    in_set_S, student_S = values.in_set_S, trajectories.student_S
    q_taken_S = _taken_q(values, options)
    used_S = in_set_S if options.out_of_set == "drop" else trajectories.has_action_S
    if student_S is not None:
        used_S = torch.where(student_S, in_set_S | values.pulled_S, used_S)
    after = _next_values(values, options, target_values)

    next_S, terminal_S = trajectories.next_S, trajectories.terminal_S
    has_next_S = trajectories.has_action_S & (next_S >= 0)
    if options.truncated == "drop":
        has_next_S &= trajectories.has_action_S[next_S.clamp(min=0)]
    next_value_S = torch.where(has_next_S, after.value_S[next_S.clamp(min=0)], 0.0)
    if options.terminal == "absorbing":
        next_value_S = torch.where(terminal_S, _taken_q(after, options), next_value_S)
    if options.terminal != "drop_chi":
        has_next_S = has_next_S | terminal_S
    if options.next_value_gradient != "full":
        next_value_S = next_value_S.detach()
    reward_S = torch.where(used_S & has_next_S, q_taken_S - discounted(next_value_S, options.gamma), 0.0)
    return Transitions(values.value_S, q_taken_S, in_set_S, used_S, has_next_S, next_value_S, reward_S)


def discounted(next_value_S: Tensor, gamma: float) -> Tensor:
    """gamma V', [S]; 0 where gamma is 0, whatever the value: 0 times -inf would be NaN."""
    return gamma * next_value_S if gamma > 0 else torch.zeros_like(next_value_S)


def negative_log_policy_taken(steps: Transitions) -> Tensor:
    """-log pibar(a_t | s_t) = -Q_t(a_t) + V_t, the sampled linear term, [S] nats; 0 where u_t = 0."""
    return torch.where(steps.used_S, -_difference(steps.q_taken_S, steps.value_S), 0.0)


def negative_log_policy_expected(q_M: Tensor, value_S: Tensor, sets: CandidateSets, log_teacher_M: Tensor) -> Tensor:
    """Expectation of the sampled linear term under the teacher, out-of-set tokens dropped, [S] nats.

    P_t sum_{a in A_t} proj_p pi*(a) [-Q_t(a) + V_t],  P_t the teacher's mass on A_t, log_teacher_M of the projected one
    """
    weight_M = torch.exp(log_teacher_M)
    log_policy_M = projected_log_policy(q_M, value_S, sets.state_M)
    term_M = torch.where(weight_M > 0, weight_M * -log_policy_M, 0.0)
    return teacher_mass(sets, dtype=q_M.dtype) * segment_sum(term_M, sets.state_M, sets.num_states)


def teacher_mass(sets: CandidateSets, *, dtype: torch.dtype) -> Tensor:
    """P_t, the teacher's mass on each set, [S]."""
    return torch.exp(-sets.neg_log_mass_S.to(dtype))


def _difference(x: Tensor, level: Tensor) -> Tensor:
    """x - level, and -inf (not NaN) where both are -inf."""
    return torch.where(x == NEG_INF, NEG_INF, x - level)


def _taken_q(values: ActionValues, options: BellmanOptions) -> Tensor:
    return torch.where(values.in_set_S | values.pulled_S, values.q_taken_S, _out_of_set_q(options))


def _next_values(values: ActionValues, options: BellmanOptions, target_values: ActionValues | None) -> ActionValues:
    if options.next_value_gradient != "target":
        return values
    if target_values is None:
        raise ConfigError(
            "--algo.distill.next_value_gradient target needs the target network's logits at the same states, and none "
            "were given; pass target_head, or use --algo.distill.next_value_gradient stop"
        )
    return target_values


def _out_of_set_q(options: BellmanOptions) -> float:
    if options.out_of_set == "clip":
        if options.q_min is None:
            raise ConfigError("--algo.distill.out_of_set clip needs a value to clip at: set --algo.distill.q_min")
        return options.q_min
    return 0.0


def _shifted(z: Tensor, shift: Tensor | None) -> Tensor:
    return z if shift is None else z - shift


def _clipped(q: Tensor, q_min: float | None) -> tuple[Tensor, Tensor]:
    """Q from below at Q_min, and where that holds it."""
    if q_min is None:
        return q, torch.zeros_like(q, dtype=torch.bool)
    return q.clamp(min=q_min), q.detach() < q_min


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
    if options.q_shift == "max" or (options.q_shift == "topp_max" and sets.is_whole):
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
