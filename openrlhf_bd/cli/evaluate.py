"""Evaluation alone: `python3 -m openrlhf_bd.cli.evaluate`, for any model and any test sets."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.cli.jobs import run_stages


def main(argv: Sequence[str] | None = None) -> int:
    """Sample from a model on test sets, score the responses, and write evaluation.json to `--ckpt.output_dir`."""
    arguments = sys.argv[1:] if argv is None else argv
    return main_guard(
        lambda: run_stages(
            arguments,
            stages=("evaluate",),
            prog="python3 -m openrlhf_bd.cli.evaluate",
            description="Sample from a model on test sets and score the responses.",
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
