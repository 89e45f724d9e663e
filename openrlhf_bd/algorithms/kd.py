"""Word-level knowledge distillation over stored candidate sets."""

from __future__ import annotations

from typing import ClassVar

from openrlhf_bd.algorithms.base import require_mask
from openrlhf_bd.algorithms.bd import BellmanDistill
from openrlhf_bd.algorithms.registry import register_algorithm
from openrlhf_bd.config import DistillConfig

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


@register_algorithm("kd")
class WordDistill(BellmanDistill):
    """Word-level distillation: forward KL to the teacher's recorded sets, one bucket for the rest (Hinton et al. 2015).

    With A the candidate set, P the teacher's mass on it, and P_theta the student's:

        L = mean over response tokens of  -sum_{a in A} pi*(a) log pi(a) - (1 - P) log(1 - P_theta)

    which is KL(teacher || student), up to the teacher's entropy, after all tokens outside A have been put into one
    bucket: at most the KL over the whole vocabulary, and from the few ids of the store alone. In the terms of
    functional.bellman: the expected linear term and the tail, without the temporal difference.
    """

    reads: ClassVar = frozenset(
        {"top_p", "include_eos", "tau", "reduction", "tail_estimator", "tail_samples", "tail_tolerance"}
    )

    @classmethod
    def objective_of(cls, options: DistillConfig) -> DistillConfig:
        require_mask(options)
        return options.model_copy(update=KD_OPTIONS)
