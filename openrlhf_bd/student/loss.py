"""The loss of a micro-batch: the algorithm's over its rollouts, and J_PT over its pre-training text."""

# S states of the rollouts, P states of the text

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from openrlhf_bd.algorithms.base import Algorithm, StepContext
from openrlhf_bd.data.micro_batches import MicroBatch, TokenBatch
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.metrics import Metrics, weighted
from openrlhf_bd.functional.trajectories import Trajectories


@dataclass(frozen=True, slots=True)
class MicroBatchLoss:
    """The loss of one micro-batch, as a function of the student's head at its states.

    L = L_algorithm + lambda_pt J_PT,   J_PT = (1/N) sum_t { (1 - r) CE_t + r KL(teacher || student)_t }

    Attributes:
        batch: on the head's device.
        algorithm: gives the loss of the rollouts.
        context: of the step; its heads have the states of the rollouts.
        num_targets: N, pre-training targets of the global batch.
        teacher_head: the teacher at the states of the text, without gradient; None where r (kd_ratio) is 0 or there is
            no text.
    """

    batch: MicroBatch
    algorithm: Algorithm
    context: StepContext
    num_targets: float
    teacher_head: StudentHead | None = None

    def __call__(self, head: StudentHead) -> tuple[Tensor, dict[str, Tensor], Metrics]:
        """Loss, its parts, and metrics.

        Args:
            head: the student at the states of the rollouts, then of the text. Gradient flows.

        Returns:
            (loss, parts, metrics): the loss with gradient; `policy_loss` and `ptx_loss`, each where there is one,
            without; name -> (sum, weight). Sums over micro-batches and ranks are those of the global batch.
        """
        num_states, num_targets = self.batch.num_states, self.batch.num_targets
        parts: dict[str, Tensor] = {}
        metrics: Metrics = {}
        if num_states:
            output = self.algorithm.loss(
                head.narrow(0, num_states), self.batch.sets, self.batch.trajectories, self.context
            )
            parts["policy_loss"] = output.loss
            metrics |= output.metrics
        if num_targets:
            parts["ptx_loss"], text_metrics = self._text_loss(head.narrow(num_states, num_targets))
            metrics |= text_metrics
        coefficients = {"policy_loss": 1.0, "ptx_loss": self.algorithm.options.pretrain_coef}
        loss = torch.stack([coefficients[name] * part for name, part in parts.items()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}, metrics

    def _text_loss(self, head: StudentHead) -> tuple[Tensor, Metrics]:
        options, target_P = self.algorithm.options, self.batch.target_P
        every_P = torch.ones(len(target_P), device=head.device)
        loss, metrics = torch.zeros((), device=head.device), {}
        if options.kd_ratio < 1:
            share_P = every_P * (1.0 - options.kd_ratio) / self.num_targets
            entropy = head.cross_entropy(target_P, share_P, z_loss_coef=options.z_loss_coef)
            loss, metrics["ptx_nll"] = loss + entropy.sum, weighted(entropy.nll_S, every_P)
        if options.kd_ratio > 0:
            assert self.teacher_head is not None, "kd_ratio needs the teacher at the states of the text"
            kl = head.forward_kl(self.teacher_head, every_P * options.kd_ratio / self.num_targets)
            loss, metrics["ptx_kl"] = loss + kl.sum, weighted(kl.value_S, every_P)
        return loss, metrics

    @torch.no_grad()
    def items_not_finite(self, head: StudentHead) -> Tensor:
        """Which rows and blocks have a loss of their own that is not finite, [len(batch.names)] bool.

        Each is computed again by itself, so this is for finding what to name once a loss was not finite.
        """
        return torch.stack([~torch.isfinite(loss(own)[0]) for loss, own in self._single_items(head)])

    def _single_items(self, head: StudentHead) -> Iterator[tuple[MicroBatchLoss, StudentHead]]:
        """The loss of each row and block alone, and the student's head at its states."""
        batch, target, live = self.batch, self.context.target_head, self.context.teacher_head
        no_target_P = batch.target_P[:0]
        for start, length in _runs(batch.trajectories.row_S.diff() != 0, batch.num_states):
            own = replace(
                batch,
                trajectories=_narrow_trajectories(batch.trajectories, start, length),
                sets=None if batch.sets is None else _narrow_sets(batch.sets, start, length),
                target_P=no_target_P,
            )
            context = replace(
                self.context,
                target_head=None if target is None else target.narrow(start, length),
                teacher_head=None if live is None else live.narrow(start, length),
            )
            yield replace(self, batch=own, context=context), head.narrow(start, length)
        state_P = batch.tokens.state_index_S[batch.num_states :]
        for start, length in _runs(batch.tokens.position_ids.flatten()[state_P][1:] == 0, batch.num_targets):
            text = replace(
                batch,
                trajectories=_narrow_trajectories(batch.trajectories, 0, 0),
                sets=None,
                target_P=batch.target_P.narrow(0, start, length),
            )
            teacher = None if self.teacher_head is None else self.teacher_head.narrow(start, length)
            yield replace(self, batch=text, teacher_head=teacher), head.narrow(batch.num_states + start, length)


def rollout_tokens(batch: MicroBatch) -> TokenBatch:
    """The part of a micro-batch's input that its rollouts need; all of it where it has none, with no state."""
    tokens, num_states = batch.tokens, batch.num_states
    end = _start_of_text(batch) if num_states and batch.num_targets else tokens.input_ids.shape[1]
    return _narrow_tokens(tokens, 0, end, tokens.state_index_S[:num_states])


def text_tokens(batch: MicroBatch) -> TokenBatch:
    """The part of a micro-batch's input that its pre-training text needs; there must be some."""
    tokens = batch.tokens
    start = _start_of_text(batch) if batch.num_states else 0
    index_P = tokens.state_index_S[batch.num_states :] - start
    return _narrow_tokens(tokens, start, tokens.input_ids.shape[1] - start, index_P)


def _start_of_text(batch: MicroBatch) -> int:
    """Position in a packed sequence where text follows rollouts: the first token of a block is a state."""
    return int(batch.tokens.state_index_S[batch.num_states])


def _narrow_tokens(tokens: TokenBatch, start: int, length: int, state_index_S: Tensor) -> TokenBatch:
    return replace(
        tokens,
        input_ids=tokens.input_ids.narrow(1, start, length),
        position_ids=tokens.position_ids.narrow(1, start, length),
        state_index_S=state_index_S,
        num_tokens=tokens.num_tokens if tokens.attention_mask is not None else tokens.input_ids.shape[0] * length,
    )


def _runs(starts: Tensor, num_states: int) -> list[tuple[int, int]]:
    """(start, length) of each run of states, where starts[i] says that state i + 1 begins one."""
    if not num_states:
        return []
    begins = [0, *(torch.nonzero(starts)[:, 0] + 1).tolist(), num_states]
    return [(begin, end - begin) for begin, end in pairwise(begins)]


def _narrow_trajectories(trajectories: Trajectories, start: int, length: int) -> Trajectories:
    """One row of trajectories, which has these states."""
    next_S, behaviour = trajectories.next_S.narrow(0, start, length), trajectories.behaviour
    return Trajectories(
        taken_S=trajectories.taken_S.narrow(0, start, length),
        next_S=torch.where(next_S >= 0, next_S - start, -1),
        terminal_S=trajectories.terminal_S.narrow(0, start, length),
        row_S=torch.zeros_like(next_S),
        behaviour=None if behaviour is None else behaviour.narrow(start, length),
    )


def _narrow_sets(sets: CandidateSets, start: int, length: int) -> CandidateSets:
    """The candidate sets of states [start, start + length)."""
    if sets.is_whole:
        return CandidateSets.whole(length, sets.neg_log_mass_S.device)
    offsets_S1 = sets.offsets_S1[start : start + length + 1]
    first, end = offsets_S1[[0, -1]].tolist()
    return CandidateSets(
        ids_M=sets.ids_M[first:end],
        offsets_S1=offsets_S1 - first,
        neg_log_mass_S=sets.neg_log_mass_S.narrow(0, start, length),
        logprobs_M=None if sets.logprobs_M is None else sets.logprobs_M[first:end],
    )
