"""Experiments: files that list stages, the stages' keys and folders, and running them (docs/reproduce.md)."""
