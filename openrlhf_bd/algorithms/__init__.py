"""Algorithms by name: what each needs from the data, and its loss. See base.Algorithm to write one."""

from openrlhf_bd.algorithms.base import Algorithm, LossOutput, Needs, StepContext
from openrlhf_bd.algorithms.registry import available_algorithms, register_algorithm, resolve_algorithm

__all__ = [
    "Algorithm",
    "LossOutput",
    "Needs",
    "StepContext",
    "available_algorithms",
    "register_algorithm",
    "resolve_algorithm",
]
