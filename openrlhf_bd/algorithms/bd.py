"""Bellman Distill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from openrlhf_bd.algorithms.base import Algorithm, LossOutput, Needs, StepContext
from openrlhf_bd.algorithms.registry import register_algorithm
from openrlhf_bd.config import BellmanOptions, DistillConfig
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.functional.bellman import bellman_loss, td_scale_at
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.options import validate_options
from openrlhf_bd.functional.trajectories import Trajectories


@register_algorithm("bd")
class BellmanDistill(Algorithm):
    """Bellman Distill: inverse soft Q-learning over the teacher's top-p candidate sets (Yu et al. 2025, Eq. 17)."""

    reads: ClassVar = frozenset(BellmanOptions.model_fields)

    def __init__(self, options: DistillConfig, stop_ids: Sequence[int], shift_constant: float | None = None) -> None:
        super().__init__(options, stop_ids, shift_constant)
        self._objective = self.objective_of(options)
        validate_options(self._objective, has_shift_constant=shift_constant is not None)

    @classmethod
    def objective_of(cls, options: DistillConfig) -> DistillConfig:
        """The options as the objective reads them."""
        return options

    @classmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        cls.refuse_unread(options)
        chosen = cls.objective_of(options)
        validate_options(chosen)
        white_box = expects_student_rows(options) and chosen.student_target != "none"
        if white_box and chosen.top_p == 1:
            raise ConfigError(
                f"--algo.distill.student_target {chosen.student_target} with --algo.distill.top_p 1 needs the "
                "teacher's log-probability of every token of the vocabulary, which no store holds; use "
                "--algo.distill.student_target none, or a top_p below 1 (0.999 keeps nearly all)"
            )
        return Needs(
            rollouts="teacher",
            candidate_sets=True,
            candidate_logprobs=chosen.linear_term == "expected" or white_box,
            shift_constant=chosen.q_shift == "constant",
            target_network=chosen.next_value_gradient == "target",
            student_rollouts="never" if chosen.objective == "released" else "optional",
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
            self._objective,
            num_tokens=context.num_tokens,
            num_rows=context.num_rows,
            shift_constant=self.shift_constant,
            stop_ids=self.stop_ids,
            td_scale=td_scale_at(context.step, self._objective),
            target_head=context.target_head,
            generator=context.generator,
            full_diagnostics=context.full_diagnostics,
        )
        return LossOutput(terms.loss, terms.metrics)


def expects_student_rows(options: DistillConfig) -> bool:
    """Whether a run with these options makes responses by the student."""
    needs = Needs(rollouts="teacher", student_rollouts="optional")
    return options.mode != "offline" and needs.student_samples(options)
