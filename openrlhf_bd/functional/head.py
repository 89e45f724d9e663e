"""What a loss may ask of the student's logits, and the plain answer from a dense [S, V] tensor."""

# S states, M candidates of all states, V vocabulary, C states of a chunk

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from openrlhf_bd.functional.candidates import CandidateSets

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


class StudentHead(Protocol):
    """The student's logits at S states, by what is asked of them. Gradient flows unless said otherwise."""

    @property
    def num_states(self) -> int:
        """S."""

    @property
    def device(self) -> torch.device:
        """Where results lie."""

    def tempered(self, tau: float) -> StudentHead:
        """The head of logits / tau."""

    def at_candidates(self, sets: CandidateSets) -> Tensor:
        """Logit of every candidate, [M]."""

    def at(self, token_S: Tensor) -> Tensor:
        """Logit of one token a state, [S]; 0 where token_S is -1."""

    def logsumexp(self) -> Tensor:
        """log sum exp of the logits over the vocabulary, [S]."""

    def logsumexp_outside(self, sets: CandidateSets) -> Tensor:
        """log sum exp over the tokens that are not candidates, [S]; -inf where every token is one."""

    def maximum(self) -> Tensor:
        """Largest logit, [S]; gradient to one argmax."""

    def log_prob(self, token_S: Tensor) -> Tensor:
        """at(token_S) - logsumexp(), [S]."""

    def statistics(self) -> HeadStatistics:
        """Log-sum-exp, entropy and argmax in one pass without gradient."""


class DenseHead:
    """StudentHead over logits_SV in plain form; float32, or float64 where the logits are.

    Args:
        logits_SV: student's logits at the states of the micro-batch, any float type. Gradient flows.
    """

    def __init__(self, logits_SV: Tensor) -> None:
        self.logits_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()

    @property
    def num_states(self) -> int:
        return len(self.logits_SV)

    @property
    def device(self) -> torch.device:
        return self.logits_SV.device

    def tempered(self, tau: float) -> DenseHead:
        return self if tau == 1.0 else DenseHead(self.logits_SV / tau)

    def at_candidates(self, sets: CandidateSets) -> Tensor:
        return self.logits_SV.reshape(-1).gather(0, _flat_index(sets, self.logits_SV.shape[1]))

    def at(self, token_S: Tensor) -> Tensor:
        logit_S = self.logits_SV.gather(1, token_S.clamp(min=0)[:, None])[:, 0]
        return torch.where(token_S >= 0, logit_S, 0.0)

    def logsumexp(self) -> Tensor:
        out_S: Tensor = _RowLogSumExp.apply(self.logits_SV, None)
        return out_S

    def logsumexp_outside(self, sets: CandidateSets) -> Tensor:
        out_S: Tensor = _RowLogSumExp.apply(self.logits_SV, _flat_index(sets, self.logits_SV.shape[1]))
        return out_S

    def maximum(self) -> Tensor:
        return self.logits_SV.max(dim=1).values

    def log_prob(self, token_S: Tensor) -> Tensor:
        return self.at(token_S) - self.logsumexp()

    @torch.no_grad()
    def statistics(self) -> HeadStatistics:
        parts = [_row_statistics(z_CV) for z_CV in self.logits_SV.split(self._rows_per_chunk())]
        return HeadStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _rows_per_chunk(self) -> int:
        return max(1, CHUNK_ELEMENTS // self.logits_SV.shape[1])


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


def _flat_index(sets: CandidateSets, vocab_size: int) -> Tensor:
    return sets.state_M * vocab_size + sets.ids_M


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
