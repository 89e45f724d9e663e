"""How far a student and its teacher are apart at the states of responses, whoever sampled them."""

# S states, C states of a block, V vocabulary, M candidates of all states, T positions of a response, N responses

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openrlhf_bd.functional.candidates import top_p_candidates
from openrlhf_bd.functional.head import CHUNK_ELEMENTS, StudentHead
from openrlhf_bd.functional.tiles import DEVICE_TILE_ELEMENTS

# Errors of KL up to so many nats a position are rounding of float32 sums.
NEGLIGIBLE_NATS = 1e-6


@dataclass(frozen=True)
class StateMeasures:
    """Measures at each state; no gradient.

    Attributes:
        forward_kl_S: KL(teacher || student) over the vocabulary, nats.
        reverse_kl_S: KL(student || teacher), nats.
        teacher_nll_S: -log of the teacher's probability of the taken token, nats.
        outside_S: the taken token is not in the teacher's top-p set.
    """

    forward_kl_S: Tensor
    reverse_kl_S: Tensor
    teacher_nll_S: Tensor
    outside_S: Tensor


@torch.no_grad()
def state_measures(student: StudentHead, teacher: StudentHead, taken_S: Tensor, *, top_p: float) -> StateMeasures:
    """Compare two policies at the same states; a [S, V] tensor is never made.

    forward_kl = sum_a p_T(a) [log p_T(a) - log p_S(a)],  reverse_kl the same with p_T and p_S swapped,
    teacher_nll = -log p_T(a_t),  outside = a_t not in A_p(s_t), the inclusive set of Def. 1

    Args:
        student: its logits.
        teacher: its own at the same states, over the same ids.
        taken_S: token taken in each state; one beyond the ids has probability 0.
        top_p: p of the sets, in (0, 1].

    Raises:
        ValueError: the heads differ in states or ids, or top_p is out of range.
    """
    ones_S = torch.ones(teacher.num_states, device=teacher.device)
    known_S = taken_S < teacher.vocab_size
    logprob_S = teacher.log_prob(torch.where(known_S, taken_S, 0))
    return StateMeasures(
        forward_kl_S=student.forward_kl(teacher, ones_S).value_S.clamp(min=0.0),
        reverse_kl_S=teacher.forward_kl(student, ones_S).value_S.clamp(min=0.0),
        teacher_nll_S=torch.where(known_S, -logprob_S, float("inf")),
        outside_S=_outside(teacher, taken_S, top_p),
    )


def _outside(teacher: StudentHead, taken_S: Tensor, top_p: float) -> Tensor:
    """Whether each taken token is outside the teacher's set, a block of states at a time."""
    if top_p == 1:
        return taken_S >= teacher.vocab_size
    elements = CHUNK_ELEMENTS if teacher.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    num_states, size = teacher.num_states, max(1, elements // teacher.vocab_size)
    outside_S = torch.ones_like(taken_S, dtype=torch.bool)
    for start in range(0, num_states, size):
        block = slice(start, min(start + size, num_states))
        sets = top_p_candidates(teacher.block(block, slice(0, teacher.vocab_size)), top_p=top_p)
        taken_M = taken_S[block][sets.state_M]
        outside_S[start + sets.state_M[sets.ids_M == taken_M]] = False
    return outside_S


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """Errors along responses, each value one position, counted from 1.

    Attributes:
        mean_T: mean error at each position over the responses that reach it, nats; NaN where none does.
        reach_T: share of the responses that reach it.
    """

    mean_T: NDArray[np.float64]
    reach_T: NDArray[np.float64]

    @staticmethod
    def of(errors: Sequence[NDArray[np.floating]]) -> ErrorCurve:
        """The curve up to the longest of N responses.

        Args:
            errors: forward KL at every position of each response, nats; at least one response.
        """
        longest = max(len(error_T) for error_T in errors)
        total_T, count_T = np.zeros(longest), np.zeros(longest)
        for error_T in errors:
            total_T[: len(error_T)] += error_T
            count_T[: len(error_T)] += 1
        return ErrorCurve(total_T / count_T, count_T / len(errors))

    def cumulative(self) -> NDArray[np.float64]:
        """Expected sum of the errors of a response up to each position, nats; what ended adds nothing."""
        return np.cumsum(np.where(self.reach_T > 0, self.reach_T * self.mean_T, 0.0))

    def head(self, length: int) -> ErrorCurve:
        """Its first positions."""
        return ErrorCurve(self.mean_T[:length], self.reach_T[:length])


def excess_error(student: ErrorCurve, teacher: ErrorCurve) -> NDArray[np.float64]:
    """Excess accumulated error up to each position l, % (Arora et al. 2022, "Why Exposure Bias Matters", Sec. 3).

    R(l) = sum_{t <= l} E_{s_t ~ student} KL(teacher || student)(s_t)      errors where the student's responses lead
    l eps(l) = the same sum with s_t ~ teacher                             errors where the teacher's responses lead
    ExAccErr(l) = 100 (R(l) - l eps(l)) / (l eps(l))

    At teacher prefixes the sum is the KL between the two distributions over responses cut at l. 0 means that the
    student's own prefixes make it err no more than the teacher's do; above 0, errors lead to further errors. An ended
    response adds nothing more to either sum. Sums of at most NEGLIGIBLE_NATS a position count as 0, and 0/0 as 0.

    Args:
        student: forward KL along the student's responses.
        teacher: along the teacher's, as many positions.

    Returns:
        [T]; inf where the student errs in its own responses alone.

    Raises:
        ValueError: the lengths differ.
    """
    if len(student.mean_T) != len(teacher.mean_T):
        raise ValueError(
            f"excess_error: found curves of {len(student.mean_T)} and {len(teacher.mean_T)} positions, expected equal "
            "lengths"
        )
    floor_T = NEGLIGIBLE_NATS * np.arange(1, len(student.mean_T) + 1)
    own_T, expected_T = student.cumulative(), teacher.cumulative()
    own_T, expected_T = np.where(own_T <= floor_T, 0.0, own_T), np.where(expected_T <= floor_T, 0.0, expected_T)
    excess_T = own_T - expected_T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(excess_T == 0.0, 0.0, 100.0 * excess_T / expected_T)
