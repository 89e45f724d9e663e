"""Sequence-level knowledge distillation."""

from __future__ import annotations

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.algorithms.registry import register_algorithm
from openrlhf_bd.algorithms.sft import SupervisedFineTuning
from openrlhf_bd.config import DistillConfig


@register_algorithm("seqkd")
class SequenceDistill(SupervisedFineTuning):
    """Sequence-level distillation: cross-entropy on the teacher's responses (Kim and Rush 2016)."""

    @classmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        return Needs(rollouts="teacher")
