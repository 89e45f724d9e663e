"""The main job: `python3 -m openrlhf_bd.cli.train_bd_ray`, beside OpenRLHF's `openrlhf.cli.train_ppo_ray`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.cli.jobs import run_stages


def main(argv: Sequence[str] | None = None) -> int:
    """Teacher's data, student, evaluation. Exit status 0, or that of the error that the message tells."""
    arguments = sys.argv[1:] if argv is None else argv
    return main_guard(
        lambda: run_stages(
            arguments,
            stages=("generate", "train", "evaluate"),
            prog="python3 -m openrlhf_bd.cli.train_bd_ray",
            description="Distil a student from a teacher: generate the teacher's data, train, evaluate.",
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
