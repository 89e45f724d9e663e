"""Options of the objective for the benchmarks, as plain values: config.py needs pydantic, a benchmark must not.

A unit test holds them equal to openrlhf_bd.config.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

ROBUST: dict[str, Any] = {
    "objective": "eq17",
    "top_p": 0.95,
    "include_eos": True,
    "alpha": 83.0,
    "gamma": 0.99,
    "tau": 1.0,
    "q_shift": "constant",
    "q_min": None,
    "linear_term": "expected",
    "out_of_set": "drop",
    "regulariser": "chi2",
    "terminal": "zero",
    "truncated": "bootstrap",
    "next_value_gradient": "full",
    "target_decay": 0.995,
    "td_warmup_steps": 0,
    "reduction": "token",
    "tail_coef": 1.0,
    "tail_estimator": "exact",
    "tail_samples": 4096,
    "tail_tolerance": 0.0,
    "student_target": "forward",
    "student_tail": True,
    "student_td": True,
    "student_out_of_set": "drop",
}

PAPER: dict[str, Any] = {
    **ROBUST,
    "top_p": 0.8,
    "include_eos": False,
    "alpha": 0.1,
    "q_shift": "max",
    "q_min": -10.0,
    "linear_term": "sampled",
    "tail_coef": 0.0,
    "student_target": "none",
}

PRESETS = {"robust": ROBUST, "paper": PAPER}


def objective_options(preset: str, **changes: Any) -> SimpleNamespace:
    """Options of a preset, with changes; usable wherever openrlhf_bd.config.BellmanOptions is read.

    Raises:
        KeyError: no such preset.
        TypeError: a change names no option.
    """
    values = PRESETS[preset]
    unknown = changes.keys() - values.keys()
    if unknown:
        raise TypeError(f"no such options of the objective: {', '.join(sorted(unknown))}")
    return SimpleNamespace(**(values | changes))
