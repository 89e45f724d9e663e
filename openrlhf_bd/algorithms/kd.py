"""Word-level knowledge distillation, over stored candidate sets or the whole vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from openrlhf_bd.algorithms.base import LossOutput, Needs, StepContext, require_mask
from openrlhf_bd.algorithms.bd import BellmanDistill
from openrlhf_bd.algorithms.registry import register_algorithm
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.functional.candidates import CandidateSets
from openrlhf_bd.functional.full_kl_loss import full_kl_loss
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.trajectories import Trajectories

# What is left of the Bellman objective without its temporal difference. The shift and the clip of Q are then without
# meaning: a cross-entropy does not depend on the level of the logits.
KD_OPTIONS = {
    "objective": "eq17",
    "linear_term": "expected",
    "tail_coef": 1.0,
    "q_shift": "none",
    "q_min": None,
    "out_of_set": "drop",
    "regulariser": "none",
    "next_value_gradient": "full",
    "td_warmup_steps": 0,
    "student_target": "forward",
    "student_tail": True,
    "student_out_of_set": "drop",
}


# What only the sets have, and what says which sets are recorded: with the teacher's responses they are, for others.
TAIL_OPTIONS = frozenset({"tail_estimator", "tail_samples", "tail_tolerance"})
SET_OPTIONS = frozenset({"top_p", "include_eos"})


@register_algorithm("kd")
class WordDistill(BellmanDistill):
    """Word-level distillation: forward KL to the teacher at every response token (Hinton et al. 2015).

    `--algo.distill.responses`: at the states of the teacher's responses, or of the data set's own (gold).

    `--algo.distill.kd_support sets`: over the recorded sets. With A the candidate set, P the teacher's mass on it, and
    P_theta the student's:

        L = mean over response tokens of  -sum_{a in A} pi*(a) log pi(a) - (1 - P) log(1 - P_theta)

    which is KL(teacher || student), up to the teacher's entropy, after all tokens outside A have been put into one
    bucket: at most the KL over the whole vocabulary, and from the few ids of the store alone. In the terms of
    functional.bellman: the expected linear term and the tail, without the temporal difference.

    `--algo.distill.kd_support full`: KL(teacher || student) over the whole vocabulary (functional.full_kl_loss), by a
    teacher that each rank holds. No set is read.
    """

    reads: ClassVar = frozenset({"tau", "reduction", "responses", "kd_support"}) | SET_OPTIONS | TAIL_OPTIONS

    @classmethod
    def objective_of(cls, options: DistillConfig) -> DistillConfig:
        if options.kd_support == "sets":
            require_mask(options)
        return options.model_copy(update=KD_OPTIONS)

    @classmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        is_gold = options.responses == "gold"
        if options.kd_support == "full":
            unread = TAIL_OPTIONS | SET_OPTIONS if is_gold else TAIL_OPTIONS
            cls.refuse_unread(options, without=unread, when="--algo.distill.kd_support full")
            needs = Needs(rollouts="teacher", live_teacher=True, student_rollouts="optional")
        else:
            needs = super().needs_of(options)
        return replace(needs, rollouts="gold", student_rollouts="never") if is_gold else needs

    def loss(
        self,
        head: StudentHead,
        sets: CandidateSets | None,
        trajectories: Trajectories,
        context: StepContext,
    ) -> LossOutput:
        if self.options.kd_support == "sets":
            return super().loss(head, sets, trajectories, context)
        if context.teacher_head is None:
            raise ValueError("no logits of the teacher: kd needs them with kd_support full (Needs.live_teacher)")
        loss, metrics = full_kl_loss(
            head,
            context.teacher_head,
            trajectories,
            self.options,
            num_tokens=context.num_tokens,
            num_rows=context.num_rows,
            stop_ids=self.stop_ids,
            full_diagnostics=context.full_diagnostics,
        )
        return LossOutput(loss, metrics)
