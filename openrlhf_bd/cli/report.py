"""Compare runs in one page.

python3 -m openrlhf_bd.cli.report RUN_DIR [RUN_DIR ...] [--output FILE.html] [--figures_dir DIR]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.evaluation.report import main_tables, write_report
from openrlhf_bd.evaluation.results import EVALUATION_FILE, RESPONSES_FILE
from openrlhf_bd.evaluation.retention import RETENTION_FILE
from openrlhf_bd.evaluation.run_data import CONFIG_FILE, METRICS_FILE, RUN_FILE, RunData, with_distinct_labels
from openrlhf_bd.evaluation.tables import terminal_table
from openrlhf_bd.evaluation.timeline import read_timeline
from openrlhf_bd.evaluation.utilisation import utilisation_tables
from openrlhf_bd.evaluation.win_rates import WIN_RATES_FILE
from openrlhf_bd.store import StoreReader, StoreSummary, summary
from openrlhf_bd.store.folder import open_folder
from openrlhf_bd.store.manifest import StoreState

REPORT_FILE = "report.html"
_SHOWN = (CONFIG_FILE, METRICS_FILE, RUN_FILE, EVALUATION_FILE, WIN_RATES_FILE, RETENTION_FILE)


def build_parser() -> argparse.ArgumentParser:
    """The command line of `openrlhf-bd report`."""
    parser = argparse.ArgumentParser(
        prog="openrlhf-bd report",
        description="Write one HTML page about a run, or about several side by side, and print their scores.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run (--ckpt.output_dir), in the order shown"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"page to write; without it: {REPORT_FILE} in the run's folder, of several runs in the current folder",
    )
    parser.add_argument("--title", help="heading of the page; without it: the names of the run folders")
    parser.add_argument("--labels", metavar="A,B,...", help="names of the methods, one a run, comma-separated")
    parser.add_argument(
        "--reference", default="", metavar="A,B,...", help="methods that are not compared, such as the teacher"
    )
    parser.add_argument(
        "--store",
        metavar="DIR",
        help="teacher's data to describe; without it: the first run's that is there",
    )
    parser.add_argument("--figures_dir", type=Path, metavar="DIR", help="also write each figure as PNG and CSV there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or that of the error whose message it printed."""
    options = build_parser().parse_args(argv)
    return main_guard(lambda: _report(options, Console()))


def _report(options: argparse.Namespace, console: Console) -> int:
    runs = with_distinct_labels(_load_runs(options.runs, options.labels))
    references = _names(options.reference)
    unknown = [label for label in references if label not in {run.label for run in runs}]
    if unknown:
        raise ConfigError(
            f"--reference {','.join(unknown)}: no such method; expected some of {', '.join(run.label for run in runs)}"
        )
    output = options.output or (options.runs[0] / REPORT_FILE if len(runs) == 1 else Path(REPORT_FILE))
    write_report(
        runs,
        output,
        title=options.title or ", ".join(dict.fromkeys(run.folder for run in runs)),
        store_summary=_store_summary(options.store, options.runs, runs),
        reference_labels=references,
        figures_dir=options.figures_dir,
    )
    for table in main_tables(runs, references):
        console.print(terminal_table(table))
    for folder, run in zip(options.runs, runs, strict=True):
        timeline = read_timeline(folder)
        for use in utilisation_tables(timeline) if timeline is not None else ():
            console.print(Text(run.label), use)
    console.print(Text(f"report: {output}"))
    return 0


def _load_runs(folders: Sequence[Path], labels: str | None) -> list[RunData]:
    names = _names(labels or "")
    if names and len(names) != len(folders):
        raise ConfigError(f"--labels {labels}: found {len(names)} names for {len(folders)} runs, expected one a run")
    for folder in folders:
        _refuse_others(folder)
    chosen: list[str] | list[None] = names or [None] * len(folders)
    return [RunData.load(folder.resolve(), label=label) for folder, label in zip(folders, chosen, strict=True)]


def _refuse_others(folder: Path) -> None:
    """Raises DataError where a folder holds nothing that a page shows."""
    several = sorted(path.name for path in folder.glob(f"*.{RESPONSES_FILE}"))
    if several and not (folder / EVALUATION_FILE).exists():
        raise DataError(
            f"{folder}: holds evaluations of several models ({', '.join(several)}); expected the folder of one run. An "
            "experiment file puts such models into one report (openrlhf-bd pipeline)"
        )
    if not folder.is_dir() or any((folder / name).exists() for name in _SHOWN):
        return
    found = "nothing of a run"
    if (folder / "pipeline.json").exists():
        pages = " and ".join(sorted(path.name for path in folder.glob("*.html"))) or "no report yet"
        found = f"an experiment ({pages}), whose runs are the folders in it"
    raise DataError(f"{folder}: holds {found}; expected the folder of a run (--ckpt.output_dir)")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _store_summary(given: str | None, folders: Sequence[Path], runs: Sequence[RunData]) -> StoreSummary | None:
    """Summary of the named store, or of the first run's teacher data on disk; None if there is none."""
    if given is not None:
        return summary(StoreReader(given, require_complete=False))
    for folder, run in zip(folders, runs, strict=True):
        path = run.option("teacher.store_path") or folder / "teacher_data"
        if StoreState.find(open_folder(path)) is not None:
            return summary(StoreReader(path, require_complete=False))
    return None


if __name__ == "__main__":
    sys.exit(main())
