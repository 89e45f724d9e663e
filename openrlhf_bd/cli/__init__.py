"""Command lines: parse, validate, run."""
