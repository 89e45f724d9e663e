"""MiniLLM."""

from __future__ import annotations

from typing import ClassVar

from openrlhf_bd.algorithms.base import Algorithm, LossOutput, Needs, StepContext, require_mask
from openrlhf_bd.algorithms.registry import register_algorithm
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.policy_gradient import policy_gradient_loss
from openrlhf_bd.functional.trajectories import Trajectories


@register_algorithm("minillm")
class MiniLLM(Algorithm):
    """MiniLLM: policy gradient on the reverse KL of whole responses, single-step decomposition (Gu et al. 2024).

    Formulas in functional.policy_gradient. Teacher-mixed sampling is `--algo.distill.teacher_mix` (0.2 in the paper),
    its language-model loss J_PT `--data.pretrain_dataset`.
    """

    reads: ClassVar = frozenset(
        {"top_p", "include_eos", "tau", "reduction", "importance", "importance_clip", "length_normalisation"}
    )

    @classmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        cls.refuse_unread(options)
        require_mask(options)
        return Needs(rollouts="teacher", candidate_sets=True, candidate_logprobs=True, student_rollouts="required")

    def loss(
        self,
        head: StudentHead,
        sets: CandidateSets | None,
        trajectories: Trajectories,
        context: StepContext,
    ) -> LossOutput:
        if sets is None:
            raise ValueError("no candidate sets: minillm needs them at every state (Needs.candidate_sets)")
        loss, metrics = policy_gradient_loss(
            head,
            sets,
            trajectories,
            self.options,
            num_tokens=context.num_tokens,
            num_rows=context.num_rows,
            stop_ids=self.stop_ids,
            full_diagnostics=context.full_diagnostics,
        )
        return LossOutput(loss, metrics)
