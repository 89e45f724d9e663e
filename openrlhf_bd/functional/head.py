"""What a loss may ask of the student's logits, and the plain answer from a dense [S, V] tensor."""

# S states, M candidates of all states, V vocabulary, C states of a chunk

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.negatives import shared_negatives
from openrlhf_bd.functional.tail import tail_cross_entropy

CHUNK_ELEMENTS = 1 << 22  # logits that a pass without gradient holds at once: small enough for a CPU cache


@dataclass(frozen=True)
class HeadStatistics:
    """Summary of the student's distribution at each state. No gradient flows.

    Attributes:
        logsumexp_S: log sum exp of the logits, nats.
        entropy_S: entropy of softmax(logits), nats.
        argmax_S: most probable token.
    """

    logsumexp_S: Tensor
    entropy_S: Tensor
    argmax_S: Tensor


@dataclass(frozen=True)
class WeightedTerm:
    """A weighted sum of something over states.

    Attributes:
        sum: sum_s weight_s value_s, scalar. Gradient flows.
        value_S: the values, detached; 0 where the weight is.
    """

    sum: Tensor
    value_S: Tensor


@dataclass(frozen=True)
class CrossEntropyTerm:
    """A weighted sum of cross-entropies and squared log-sum-exps over states.

    Attributes:
        sum: sum_s weight_s (nll_s + z_loss_coef logsumexp_s^2), scalar. Gradient flows.
        nll_S: -log softmax(z)(target), nats, detached; 0 where the weight is.
        logsumexp_S: log sum exp of the logits, nats, detached; 0 where the weight is.
    """

    sum: Tensor
    nll_S: Tensor
    logsumexp_S: Tensor


class StudentHead(Protocol):
    """The student's logits at S states, by what is asked of them. Gradient flows unless said otherwise."""

    @property
    def num_states(self) -> int:
        """S."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def device(self) -> torch.device:
        """Where results lie."""

    def tempered(self, tau: float) -> StudentHead:
        """The head of logits / tau."""

    def narrow(self, start: int, length: int) -> StudentHead:
        """The head of states [start, start + length). Gradients end in the same place."""

    def at_candidates(self, sets: CandidateSets) -> Tensor:
        """Logit of every candidate, [M]."""

    def at(self, token_S: Tensor) -> Tensor:
        """Logit of one token a state, [S]; 0 where token_S is -1."""

    def logsumexp(self) -> Tensor:
        """log sum exp of the logits over the vocabulary, [S]."""

    def soft_value(self, shift_S: Tensor | None, q_min: float | None) -> Tensor:
        """log sum_a exp max(z_a - shift, q_min) over the vocabulary, [S], also with gradient into the shift."""

    def logsumexp_outside(self, sets: CandidateSets) -> Tensor:
        """log sum exp over the tokens that are not candidates, [S]; -inf where every token is one."""

    def maximum(self) -> Tensor:
        """Largest logit, [S]; gradient to one argmax."""

    def log_prob(self, token_S: Tensor) -> Tensor:
        """at(token_S) - logsumexp(), [S]."""

    def tail(
        self,
        sets: CandidateSets,
        inside_S: Tensor,
        weight_S: Tensor,
        *,
        estimator: Literal["exact", "sampled"] = "exact",
        num_samples: int = 4096,
        tolerance: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> WeightedTerm:
        """Weighted sum of functional.tail.tail_cross_entropy.

        Args:
            sets: candidate sets.
            inside_S: log sum exp of the logits over each set, nats. Gradient flows.
            weight_S: weight of each state; one of weight 0 costs nothing.
            estimator: log sum exp outside the sets: exact, or estimated from functional.negatives.shared_negatives.
            num_samples: ids drawn for `sampled`.
            tolerance: states with |P_theta - P| below it are left out of the backward pass.
            generator: source of the drawn ids; None: PyTorch's own.
        """

    def cross_entropy(self, target_S: Tensor, weight_S: Tensor, *, z_loss_coef: float = 0.0) -> CrossEntropyTerm:
        """Weighted sum of -log softmax(z)(target) + z_loss_coef logsumexp^2; targets of weight 0 are not looked at."""

    def forward_kl(self, teacher: StudentHead, weight_S: Tensor) -> WeightedTerm:
        """Weighted sum of KL(teacher || student) over the vocabulary. No gradient flows to the teacher.

        Raises:
            ValueError: teacher and student differ in states or vocabulary.
        """

    def block(self, states: slice | Tensor, ids: slice) -> Tensor:
        """Logits of some states and a range of ids, a new tensor. No gradient flows."""

    def statistics(self) -> HeadStatistics:
        """Log-sum-exp, entropy and argmax. No gradient flows."""

    @property
    def statistics_are_free(self) -> bool:
        """Whether statistics() needs no walk over the vocabulary of its own."""


class DenseHead:
    """StudentHead over logits_SV in plain form; float32, or float64 where the logits are. The reference.

    Args:
        logits_SV: student's logits at the states of the micro-batch, any float type. Gradient flows.
    """

    statistics_are_free = True

    def __init__(self, logits_SV: Tensor) -> None:
        self.logits_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()

    @property
    def num_states(self) -> int:
        return len(self.logits_SV)

    @property
    def vocab_size(self) -> int:
        return self.logits_SV.shape[1]

    @property
    def device(self) -> torch.device:
        return self.logits_SV.device

    def tempered(self, tau: float) -> DenseHead:
        return self if tau == 1.0 else DenseHead(self.logits_SV / tau)

    def narrow(self, start: int, length: int) -> DenseHead:
        return DenseHead(self.logits_SV.narrow(0, start, length))

    def at_candidates(self, sets: CandidateSets) -> Tensor:
        return self.logits_SV.reshape(-1).gather(0, sets.state_M * self.vocab_size + sets.ids_M)

    def at(self, token_S: Tensor) -> Tensor:
        logit_S = self.logits_SV.gather(1, token_S.clamp(min=0)[:, None])[:, 0]
        return torch.where(token_S >= 0, logit_S, 0.0)

    def logsumexp(self) -> Tensor:
        out_S: Tensor = _RowLogSumExp.apply(self.logits_SV, None)
        return out_S

    def soft_value(self, shift_S: Tensor | None, q_min: float | None) -> Tensor:
        q_SV = self.logits_SV if shift_S is None else self.logits_SV - shift_S[:, None]
        return DenseHead(q_SV if q_min is None else q_SV.clamp(min=q_min)).logsumexp()

    def logsumexp_outside(self, sets: CandidateSets) -> Tensor:
        return _logsumexp_outside(self.logits_SV, sets, sets.ids_M)

    def maximum(self) -> Tensor:
        return self.logits_SV.max(dim=1).values

    def log_prob(self, token_S: Tensor) -> Tensor:
        return self.at(token_S) - self.logsumexp()

    def tail(
        self,
        sets: CandidateSets,
        inside_S: Tensor,
        weight_S: Tensor,
        *,
        estimator: Literal["exact", "sampled"] = "exact",
        num_samples: int = 4096,
        tolerance: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> WeightedTerm:
        if estimator == "exact":
            outside_S = self.logsumexp_outside(sets)
        else:
            negatives = shared_negatives(sets, self.vocab_size, num_samples=num_samples, generator=generator)
            weighted_SK = self.logits_SV[:, negatives.ids_K] + negatives.log_weight_K.to(self.logits_SV.dtype)
            outside_S = _logsumexp_outside(weighted_SK, sets, torch.searchsorted(negatives.ids_K, sets.ids_M))
        value_S = tail_cross_entropy(inside_S, outside_S, sets, tolerance=tolerance)
        return weighted_term(value_S, weight_S)

    def cross_entropy(self, target_S: Tensor, weight_S: Tensor, *, z_loss_coef: float = 0.0) -> CrossEntropyTerm:
        return cross_entropy_term(self, self.logsumexp(), target_S, weight_S, z_loss_coef=z_loss_coef)

    def forward_kl(self, teacher: StudentHead, weight_S: Tensor) -> WeightedTerm:
        check_teacher(self, teacher)
        log_teacher_SV = torch.log_softmax(teacher.block(slice(0, self.num_states), slice(0, self.vocab_size)), dim=1)
        log_student_SV = torch.log_softmax(self.logits_SV, dim=1)
        kl_SV = log_teacher_SV.exp() * (log_teacher_SV - log_student_SV)
        return weighted_term(torch.where(log_teacher_SV == float("-inf"), 0.0, kl_SV).sum(dim=1), weight_S)

    @torch.no_grad()
    def block(self, states: slice | Tensor, ids: slice) -> Tensor:
        return self.logits_SV[states][:, ids].clone()

    @torch.no_grad()
    def statistics(self) -> HeadStatistics:
        parts = [_row_statistics(z_CV) for z_CV in self.logits_SV.split(max(1, CHUNK_ELEMENTS // self.vocab_size))]
        return HeadStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def weighted_term(value_S: Tensor, weight_S: Tensor) -> WeightedTerm:
    """The weighted sum of values; a value of weight 0 counts nowhere, whatever it is."""
    counted_S = weight_S != 0
    value_S = torch.where(counted_S, value_S, 0.0)
    return WeightedTerm((weight_S.to(value_S.dtype) * value_S).sum(), value_S.detach())


def cross_entropy_term(
    head: StudentHead, logsumexp_S: Tensor, target_S: Tensor, weight_S: Tensor, *, z_loss_coef: float
) -> CrossEntropyTerm:
    """CrossEntropyTerm of a head whose log-sum-exp is known (where the weight is not 0)."""
    counted_S = weight_S != 0
    logsumexp_S = torch.where(counted_S, logsumexp_S, 0.0)
    nll_S = logsumexp_S - head.at(torch.where(counted_S, target_S, -1))
    loss_S = nll_S + z_loss_coef * logsumexp_S.square() if z_loss_coef > 0 else nll_S
    return CrossEntropyTerm((weight_S.to(loss_S.dtype) * loss_S).sum(), nll_S.detach(), logsumexp_S.detach())


def check_teacher(student: StudentHead, teacher: StudentHead) -> None:
    """Refuse a teacher whose states or vocabulary are not the student's.

    Raises:
        ValueError: with both shapes.
    """
    ours, theirs = (student.num_states, student.vocab_size), (teacher.num_states, teacher.vocab_size)
    if ours != theirs:
        raise ValueError(
            f"the student's logits are {list(ours)} (states, vocabulary) and the teacher's {list(theirs)}; a KL over "
            "the vocabulary needs both at the same states over the same tokens"
        )


def mean_log_sum_exp(head: StudentHead, mask_S: Tensor, *, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sum and count of the log-sum-exp of logits / tau: what the constant shift of Q is the mean of.

    Args:
        head: the starting student's logits. No gradient flows.
        mask_S: states that count (those with an action).
        tau: temperature that divides the logits to make Q.

    Returns:
        (sum, count), float64 scalars; add them over micro-batches and ranks, then divide.
    """
    with torch.no_grad():
        logsumexp_S = head.tempered(tau).logsumexp().double()
        return torch.where(mask_S, logsumexp_S, 0.0).sum(), mask_S.sum().double()


def end_log_prob(head: StudentHead, statistics: HeadStatistics, stop_ids: Sequence[int]) -> Tensor:
    """log of the student's probability that a response ends here: of any of the stop tokens. No gradient flows.

    Args:
        head: the student's logits.
        statistics: its statistics.
        stop_ids: stop tokens, at least one.

    Returns:
        [S], nats.
    """
    with torch.no_grad():
        tokens_S = [torch.full((head.num_states,), token_id, device=head.device) for token_id in stop_ids]
        logits = torch.stack([head.at(token_S) for token_S in tokens_S])
        return torch.logsumexp(logits, dim=0) - statistics.logsumexp_S


def _logsumexp_outside(z_SK: Tensor, sets: CandidateSets, column_M: Tensor) -> Tensor:
    if sets.is_whole:
        return z_SK.new_full((len(z_SK),), float("-inf"))
    out_S: Tensor = _RowLogSumExp.apply(z_SK, sets.state_M * z_SK.shape[1] + column_M)
    return out_S


def _row_statistics(z_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    max_C, argmax_C = z_CV.max(dim=1)
    shifted_CV = (z_CV - max_C[:, None]).clamp_(min=torch.finfo(z_CV.dtype).min)  # 0 * -inf would be NaN
    weight_CV = torch.exp(shifted_CV)
    total_C = weight_CV.sum(dim=1)
    log_total_C = torch.log(total_C)
    entropy_C = log_total_C - weight_CV.mul_(shifted_CV).sum(dim=1) / total_C
    return log_total_C + max_C, entropy_C, argmax_C


class _RowLogSumExp(torch.autograd.Function):
    """log sum exp of each row over the elements whose flat index is not listed.

    torch.logsumexp keeps a masked copy of its input for the backward pass and gives NaN gradients for a row whose
    every element is -inf; this keeps the input itself, and gives 0.
    """

    @staticmethod
    def forward(ctx: Any, z_SV: Tensor, excluded: Tensor | None) -> Tensor:
        masked_SV = z_SV
        if excluded is not None:
            masked_SV = z_SV.clone(memory_format=torch.contiguous_format)
            masked_SV.view(-1).index_fill_(0, excluded, float("-inf"))
        out_S = torch.logsumexp(masked_SV, dim=1)
        ctx.save_for_backward(z_SV, out_S, excluded)
        return out_S

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        z_SV, out_S, excluded = ctx.saved_tensors
        safe_S = torch.where(out_S == float("-inf"), 0.0, out_S)
        grad_SV = (z_SV - safe_S[:, None]).contiguous()
        if excluded is not None:
            grad_SV.view(-1).index_fill_(0, excluded, float("-inf"))
        return grad_SV.exp_().mul_(grad_outputs[0][:, None]), None
