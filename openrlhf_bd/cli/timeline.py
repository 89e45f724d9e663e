"""Who worked and who waited in a run.

python3 -m openrlhf_bd.cli.timeline RUN_DIR [--trace FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.timeline import TIMELINE_FILE, read_timeline, write_trace
from openrlhf_bd.evaluation.utilisation import utilisation_tables


def build_parser() -> argparse.ArgumentParser:
    """The command line of `openrlhf-bd timeline`."""
    parser = argparse.ArgumentParser(
        prog="openrlhf-bd timeline",
        description="Print which share of a run's time its engines, ranks and driver worked, and whom they waited for.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run (--ckpt.output_dir)")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="also write a trace there (JSON), which https://ui.perfetto.dev opens",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or that of the error whose message it printed."""
    options = build_parser().parse_args(argv)
    return main_guard(lambda: _show(options.run, options.trace, Console()))


def _show(folder: Path, trace: Path | None, console: Console) -> int:
    timeline = read_timeline(folder)
    if timeline is None or not timeline.spans:
        raise DataError(f"{folder / TIMELINE_FILE}: no spans found; expected the folder of a run that has begun")
    for table in utilisation_tables(timeline):
        console.print(table)
    if trace is not None:
        write_trace(timeline, trace, title=folder.resolve().name)
        console.print(Text(f"trace: {trace} (open it in https://ui.perfetto.dev)"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
