"""On-policy distillation by reverse KL."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.algorithms.gkd import GeneralisedDistill
from openrlhf_bd.algorithms.registry import register_algorithm
from openrlhf_bd.config import DistillConfig


@register_algorithm("rkl")
class ReverseDistill(GeneralisedDistill):
    """On-policy distillation: reverse KL at the states of the student's own responses, over the recorded sets.

        L = mean over response tokens of
            sum_{a in A} pi(a) log [pi(a) / pi*(a)] + (1 - P_theta) log [(1 - P_theta) / (1 - P)]

    with A the candidate set, P and P_theta the teacher's and the student's mass on it: at most the reverse KL over the
    vocabulary. It is gkd with jsd_beta 1 where the student samples: all rows with `--algo.distill.rollout student`.
    """

    reads: ClassVar = GeneralisedDistill.reads - {"jsd_beta"}

    @classmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        return replace(super().needs_of(options), student_rollouts="required")

    @property
    def beta(self) -> float:
        return 1.0
