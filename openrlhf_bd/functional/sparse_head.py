"""The student's logits from hidden states and output embedding, without a [S, V] tensor."""

# S states, R some of the states, M candidates of all states, H hidden size, V vocabulary

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.full_kl import forward_kl
from openrlhf_bd.functional.gather_dot import gather_dot
from openrlhf_bd.functional.gradient_sink import GradientSink
from openrlhf_bd.functional.head import (
    CrossEntropyTerm,
    HeadStatistics,
    StudentHead,
    WeightedTerm,
    check_teacher,
    cross_entropy_term,
    weighted_term,
)
from openrlhf_bd.functional.linear_logits import LinearLogits
from openrlhf_bd.functional.negatives import shared_negatives
from openrlhf_bd.functional.streaming import KnownStatistics, walk_moments, with_gradient
from openrlhf_bd.functional.tail import tail_cross_entropy
from openrlhf_bd.functional.tiles import Columns, Walk

FREE_SHARE = 1 / 16  # of the states may be missing in what is called free


class SparseHead:
    """StudentHead that computes the logits it is asked for, from hidden states and the output embedding.

    Logits at candidates are dot products with single rows of the embedding. What depends on the whole vocabulary is
    computed in tiles, and made again in the backward pass. A walk over the vocabulary that was needed anyway also
    gives the statistics of its states. Gradients of weight and bias, whatever asks for them, meet in one [V, H] buffer.

    Args:
        hidden_SH: hidden states before the output embedding, any float type. Gradient flows.
        weight_VH: output embedding: the parameter itself. Gradient flows unless it is frozen.
        bias_V: its bias, or None.

    Raises:
        ValueError: shapes that do not fit, or float64 mixed with another type.
    """

    def __init__(self, hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None) -> None:
        _check(hidden_SH, weight_VH, bias_V)
        sink = GradientSink(weight_VH, bias_V)
        self._logits = LinearLogits(hidden_SH, weight_VH, bias_V, 1.0, sink, sink.anchor(weight_VH, bias_V))
        self._known = KnownStatistics.none(len(hidden_SH), self._logits)

    def _derived(self, logits: LinearLogits, known: KnownStatistics) -> SparseHead:
        head = SparseHead.__new__(SparseHead)
        head._logits, head._known = logits, known
        return head

    @property
    def num_states(self) -> int:
        return len(self._logits.hidden_SH)

    @property
    def vocab_size(self) -> int:
        return self._logits.vocab_size

    @property
    def device(self) -> torch.device:
        return self._logits.hidden_SH.device

    def tempered(self, tau: float) -> SparseHead:
        if tau == 1.0:
            return self
        logits = replace(self._logits, scale=self._logits.scale / tau)
        return self._derived(logits, KnownStatistics.none(self.num_states, logits))

    def narrow(self, start: int, length: int) -> SparseHead:
        if (start, length) == (0, self.num_states):
            return self
        logits = replace(self._logits, hidden_SH=self._logits.hidden_SH.narrow(0, start, length))
        return self._derived(logits, self._known.narrow(start, length))

    def at_candidates(self, sets: CandidateSets) -> Tensor:
        return gather_dot(self._logits, sets.ids_M, sets.offsets_S1)

    def at(self, token_S: Tensor) -> Tensor:
        has_token_S = token_S >= 0
        offsets_S1 = torch.cat([has_token_S.new_zeros(1), has_token_S]).cumsum(0)
        states_R = torch.nonzero(has_token_S)[:, 0]
        z_R = gather_dot(self._logits, token_S[states_R], offsets_S1)
        return z_R.new_zeros(self.num_states).index_copy(0, states_R, z_R)

    def logsumexp(self) -> Tensor:
        value_S = self.statistics().logsumexp_S
        return with_gradient(self._walk(self._every_state()), value_S)

    def soft_value(self, shift_S: Tensor | None, q_min: float | None) -> Tensor:
        if q_min is None:
            return self.logsumexp() if shift_S is None else self.logsumexp() - shift_S
        walk = self._walk(self._every_state())
        value_S = walk_moments(walk, shift_R=shift_S, floor=q_min)[0].logsumexp()
        return with_gradient(walk, value_S, shift_S=shift_S, floor=q_min)

    def logsumexp_outside(self, sets: CandidateSets) -> Tensor:
        return self._logsumexp_outside(sets, self._every_state())

    def maximum(self) -> Tensor:
        return self.at(self.statistics().argmax_S)

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
        columns = None
        if estimator == "sampled":
            columns = Columns.sampled(
                shared_negatives(sets, self.vocab_size, num_samples=num_samples, generator=generator)
            )
        outside_S = self._logsumexp_outside(sets, torch.nonzero(weight_S)[:, 0], columns)
        return weighted_term(tail_cross_entropy(inside_S, outside_S, sets, tolerance=tolerance), weight_S)

    def cross_entropy(self, target_S: Tensor, weight_S: Tensor, *, z_loss_coef: float = 0.0) -> CrossEntropyTerm:
        states_R = torch.nonzero(weight_S)[:, 0]
        self._know(states_R)
        logsumexp_S = with_gradient(self._walk(states_R), self._known.logsumexp_S)
        return cross_entropy_term(self, logsumexp_S, target_S, weight_S, z_loss_coef=z_loss_coef)

    def forward_kl(self, teacher: StudentHead, weight_S: Tensor) -> WeightedTerm:
        check_teacher(self, teacher)
        walk = self._walk(torch.nonzero(weight_S)[:, 0])
        value_S, student = forward_kl(walk, teacher)
        self._known.record(walk.states_R, student)
        return weighted_term(value_S, weight_S)

    def block(self, states: slice | Tensor, ids: slice) -> Tensor:
        return self._logits.block(states, ids)

    def statistics(self) -> HeadStatistics:
        self._know(self._every_state())
        return HeadStatistics(self._known.logsumexp_S, self._known.entropy_S, self._known.argmax_S)

    @property
    def statistics_are_free(self) -> bool:
        return self._known.num_missing <= FREE_SHARE * self.num_states

    def _every_state(self) -> Tensor:
        return torch.arange(self.num_states, device=self.device)

    def _walk(self, states_R: Tensor, columns: Columns | None = None, outside: CandidateSets | None = None) -> Walk:
        return Walk(self._logits, states_R, columns or Columns(self.vocab_size), outside)

    def _know(self, states_R: Tensor) -> None:
        """Walk over the vocabulary for those of the states whose statistics are not known yet."""
        missing_R = self._known.missing(states_R)
        if len(missing_R):
            self._known.record(missing_R, walk_moments(self._walk(missing_R))[0])

    def _logsumexp_outside(self, sets: CandidateSets, states_R: Tensor, columns: Columns | None = None) -> Tensor:
        """[S]; -inf at the other states."""
        walk = self._walk(states_R, columns, sets)
        value_S = torch.full((self.num_states,), float("-inf"), dtype=self._logits.dtype, device=self.device)
        if len(states_R) and not sets.is_whole:
            outside, candidates = walk_moments(walk)
            value_S[states_R] = outside.logsumexp()
            if columns is None:
                self._known.record(states_R, outside if candidates is None else outside.plus(candidates))
        return with_gradient(walk, value_S)


def _check(hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> None:
    shapes = [list(x.shape) for x in (hidden_SH, weight_VH, bias_V) if x is not None]
    if hidden_SH.ndim != 2 or weight_VH.ndim != 2 or hidden_SH.shape[1] != weight_VH.shape[1]:
        raise ValueError(f"hidden states and output embedding are {shapes}; [S, H] and [V, H] are needed")
    if bias_V is not None and bias_V.shape != weight_VH.shape[:1]:
        raise ValueError(f"hidden states, output embedding and its bias are {shapes}; [S, H], [V, H], [V] are needed")
    doubles = {x.dtype == torch.float64 for x in (hidden_SH, weight_VH, bias_V) if x is not None}
    if len(doubles) > 1:
        raise ValueError(
            f"hidden states are {hidden_SH.dtype} and the output embedding {weight_VH.dtype}; float64 does not mix"
        )
