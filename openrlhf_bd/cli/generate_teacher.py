"""The teacher's data alone: `python3 -m openrlhf_bd.cli.generate_teacher`, resumable by the same command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.cli.jobs import run_stages


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the store of `--teacher.store_path`, or <ckpt.output_dir>/teacher_data."""
    arguments = sys.argv[1:] if argv is None else argv
    return main_guard(
        lambda: run_stages(
            arguments,
            stages=("generate",),
            prog="python3 -m openrlhf_bd.cli.generate_teacher",
            description="Generate the teacher's responses with their candidate sets.",
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
