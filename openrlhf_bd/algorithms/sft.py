"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from openrlhf_bd.algorithms.base import Algorithm, LossOutput, Needs, StepContext
from openrlhf_bd.algorithms.registry import register_algorithm
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.cross_entropy import token_cross_entropy
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.trajectories import Trajectories, reduction_weights


@register_algorithm("sft")
class SupervisedFineTuning(Algorithm):
    """Supervised fine-tuning: cross-entropy on the data set's own responses, with an optional z-loss."""

    reads: ClassVar = frozenset({"reduction"})

    @classmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        cls.refuse_unread(options)
        return Needs(rollouts="gold")

    def loss(
        self,
        head: StudentHead,
        sets: CandidateSets | None,
        trajectories: Trajectories,
        context: StepContext,
    ) -> LossOutput:
        loss, metrics = token_cross_entropy(
            head,
            trajectories.taken_S,
            reduction_weights(trajectories, self.options.reduction),
            denominator=context.num_tokens if self.options.reduction == "token" else context.num_rows,
            z_loss_coef=self.options.z_loss_coef,
        )
        return LossOutput(loss, metrics)
