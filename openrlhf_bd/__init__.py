"""Bellman Distill for OpenRLHF: distillation of language models by temporal-difference imitation learning."""

__version__ = "0.1.0"
