"""Sequence-level knowledge distillation."""

from __future__ import annotations

from typing import ClassVar

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.algorithms.registry import register_algorithm
from openrlhf_bd.algorithms.sft import SupervisedFineTuning
from openrlhf_bd.config import DistillConfig


@register_algorithm("seqkd")
class SequenceDistill(SupervisedFineTuning):
    """Sequence-level distillation: cross-entropy on the teacher's responses (Kim and Rush 2016)."""

    # Its loss reads no sets, but they are recorded with its responses, for other algorithms on the same store.
    reads: ClassVar = frozenset({"reduction", "top_p", "include_eos"})

    @classmethod
    def needs_of(cls, options: DistillConfig) -> Needs:
        cls.refuse_unread(options)
        return Needs(rollouts="teacher")
