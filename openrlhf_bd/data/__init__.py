"""Prompts, templates, pre-training text, order and micro-batches."""
