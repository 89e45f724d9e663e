"""Generalised knowledge distillation."""

from __future__ import annotations

from typing import ClassVar

from openrlhf_bd.algorithms.base import Algorithm, LossOutput, Needs, StepContext, require_mask
from openrlhf_bd.algorithms.registry import register_algorithm
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.divergence_loss import divergence_loss
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.trajectories import Trajectories


@register_algorithm("gkd")
class GeneralisedDistill(Algorithm):
    """Generalised distillation: Jensen-Shannon divergence on data and the student's responses (Agarwal et al. 2024).

    `--algo.distill.jsd_beta` is its coefficient, with TRL's convention: 0 forward KL, 1 reverse KL, between them

        beta KL(teacher || m) + (1 - beta) KL(student || m),   m = beta teacher + (1 - beta) student

    over the recorded sets and one bucket for all other tokens (functional.divergences). The data are the teacher's
    responses; `--algo.distill.student_fraction` of the rows are the student's, GKD's lambda.
    """

    reads: ClassVar = frozenset({"top_p", "include_eos", "tau", "reduction", "jsd_beta", "divergence_support"})

    @classmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        cls.refuse_unread(options)
        require_mask(options)
        return Needs(rollouts="teacher", candidate_sets=True, candidate_logprobs=True, student_rollouts="optional")

    @property
    def beta(self) -> float:
        """Coefficient of the divergence."""
        return self.options.jsd_beta

    def loss(
        self,
        head: StudentHead,
        sets: CandidateSets | None,
        trajectories: Trajectories,
        context: StepContext,
    ) -> LossOutput:
        if sets is None:
            raise ValueError(f"no candidate sets: {self.options.name} needs them at every state (Needs.candidate_sets)")
        loss, metrics = divergence_loss(
            head,
            sets,
            trajectories,
            self.options,
            beta=self.beta,
            num_tokens=context.num_tokens,
            num_rows=context.num_rows,
            stop_ids=self.stop_ids,
            full_diagnostics=context.full_diagnostics,
        )
        return LossOutput(loss, metrics)
