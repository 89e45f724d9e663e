"""Word-level knowledge distillation over stored candidate sets."""

from __future__ import annotations

from collections.abc import Sequence

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.algorithms.bd import BellmanDistill
from openrlhf_bd.algorithms.registry import register_algorithm
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.errors import ConfigError

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

    def __init__(self, options: DistillConfig, stop_ids: Sequence[int], shift_constant: float | None = None) -> None:
        super().__init__(_kd_options(options), stop_ids, shift_constant)

    @classmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        return super().needs_of(_kd_options(options))


def _kd_options(options: DistillConfig) -> DistillConfig:
    if options.top_p == 1:
        raise ConfigError(
            f"--algo.distill.name {options.name} with --algo.distill.top_p 1 needs the teacher's log-probability of "
            "every token of the vocabulary, which no store holds; use a top_p below 1 (0.999 keeps nearly all)"
        )
    return options.model_copy(update=KD_OPTIONS)
