"""Bellman Distill."""

from __future__ import annotations

from collections.abc import Sequence

from openrlhf_bd.algorithms.base import Algorithm, LossOutput, Needs, StepContext
from openrlhf_bd.algorithms.registry import register_algorithm
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.functional.bellman import bellman_loss, td_scale_at
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.options import validate_options
from openrlhf_bd.functional.trajectories import Trajectories


@register_algorithm("bd")
class BellmanDistill(Algorithm):
    """Bellman Distill: inverse soft Q-learning over the teacher's top-p candidate sets (Yu et al. 2025, Eq. 17)."""

    def __init__(self, options: DistillConfig, stop_ids: Sequence[int], shift_constant: float | None = None) -> None:
        super().__init__(options, stop_ids, shift_constant)
        validate_options(options, has_shift_constant=shift_constant is not None)

    @classmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        validate_options(options)
        return Needs(
            rollouts="teacher",
            candidate_sets=True,
            candidate_logprobs=options.linear_term == "expected",
            shift_constant=options.q_shift == "constant",
            target_network=options.next_value_gradient == "target",
        )

    def loss(
        self,
        head: StudentHead,
        sets: CandidateSets | None,
        trajectories: Trajectories,
        context: StepContext,
    ) -> LossOutput:
        if sets is None:
            raise ValueError("no candidate sets: bd needs them at every state (Needs.candidate_sets)")
        terms = bellman_loss(
            head,
            sets,
            trajectories,
            self.options,
            num_tokens=context.num_tokens,
            num_rows=context.num_rows,
            shift_constant=self.shift_constant,
            stop_ids=self.stop_ids,
            td_scale=td_scale_at(context.step, self.options),
            target_head=context.target_head,
            generator=context.generator,
            full_diagnostics=context.full_diagnostics,
        )
        return LossOutput(terms.loss, terms.metrics)
