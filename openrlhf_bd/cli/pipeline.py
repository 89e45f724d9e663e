"""`openrlhf-bd pipeline`: the stages of an experiment file, each unless it is finished, and one report at the end."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openrlhf_bd.cli.flags import add_flag, add_options, command_parser, given_flags, main_guard, parse_arguments
from openrlhf_bd.cli.options import Option, section_options
from openrlhf_bd.config import JudgeOptions
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.experiments.schema import JUDGE

if TYPE_CHECKING:
    from openrlhf_bd.experiments.prepare import Checked, Prepared, Request
    from openrlhf_bd.experiments.record import PipelineRecord
    from openrlhf_bd.experiments.running import Run

PROG = "openrlhf-bd pipeline"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `openrlhf-bd pipeline`."""
    return main_guard(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    parser = pipeline_parser(PROG, "FILE", "Run the stages of an experiment file (docs/reproduce.md).")
    parser.add_argument("file", metavar="FILE", help="experiment file", nargs="?")
    arguments = parse_arguments(parser, argv)
    if arguments.get("file") is None:
        raise ConfigError(f"command line: no experiment file is given; expected {PROG} FILE")
    run_experiment(Path(arguments["file"]), arguments)
    return 0


def pipeline_parser(prog: str, first: str, description: str) -> argparse.ArgumentParser:
    """The flags that commands which run experiments have in common.

    Args:
        prog: name of the command.
        first: its first argument, for help.
        description: what it does.
    """
    parser = command_parser(
        prog,
        description=description,
        usage=f"{prog} {first} --output_dir DIR\n"
        "         [--scale NAME] [--data DIR] [--mode offline|online] [--only STAGE,...] [--dry_run]\n"
        "         [--OPTION VALUE ...]",
        epilog="--OPTION: options of the main job, for every stage that reads them; openrlhf-bd train --help "
        "describes them. Values: defaults < preset < option files < stage < scale < flags. Finished stages are reused.",
    )
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the experiment")
    parser.add_argument("--scale", metavar="NAME", help="models and data: full, toy (default: full)")
    parser.add_argument("--data", metavar="DIR", help="folder of the data sets that the scale names")
    parser.add_argument(
        "--mode",
        choices=["offline", "online"],
        help="online: methods that can learn from the student's own responses do so while it trains (default: "
        "offline, as the files say)",
    )
    parser.add_argument("--only", metavar="STAGE,...", help="run these stages alone; what they need must be finished")
    parser.add_argument(
        "--dry_run", action="store_true", default=False, help="check everything, print the plan, and stop"
    )
    add_options(parser, described=False)
    group = parser.add_argument_group("--judge.*", "stages of kind judge")
    for option in judge_flags().values():
        add_flag(group, option)
    return parser


def judge_flags() -> dict[str, Option]:
    """The options of stages of kind judge, by the names of their flags."""
    return {JUDGE + name: replace(option, name=JUDGE + name) for name, option in section_options(JudgeOptions).items()}


def run_experiment(path: Path, arguments: dict[str, Any]) -> None:
    """Check, print the plan, run what is not finished, and write the report; with `--dry_run` only the first two.

    Args:
        path: experiment file.
        arguments: of `pipeline_parser`.

    Raises:
        BDError: see `openrlhf_bd.experiments`.
    """
    from openrlhf_bd.experiments.prepare import Request, check_options

    if "output_dir" not in arguments:
        raise ConfigError("command line: --output_dir is not given; name the folder of the experiment")
    request = Request(
        output_dir=Path(arguments["output_dir"]).expanduser().absolute(),
        scale=arguments.get("scale"),
        data_dir=Path(arguments["data"]) if "data" in arguments else None,
        mode=arguments.get("mode", "offline"),
        only=arguments.get("only"),
        flags=given_flags(arguments) | given_flags(arguments, judge_flags()),
    )
    checked = check_options(path, request)
    if arguments["dry_run"]:
        _show_plan(checked, request)
    else:
        _run(checked, request)


def _show_plan(checked: Checked, request: Request) -> None:
    """Nothing is written: inputs that are not there yet are made elsewhere, since keys follow from their contents."""
    from openrlhf_bd.experiments.digests import CACHE_FILE, InputDigests
    from openrlhf_bd.experiments.prepare import prepare
    from openrlhf_bd.experiments.record import RECORD_FILE, PipelineRecord

    PipelineRecord.check(request.output_dir)
    there = (request.output_dir / RECORD_FILE).exists()
    with tempfile.TemporaryDirectory(prefix="openrlhf-bd-") as folder:
        inputs_dir = request.output_dir if there else Path(folder)
        prepared = prepare(checked, request, InputDigests(request.output_dir / CACHE_FILE), inputs_dir=inputs_dir)
        _planned(checked, prepared)


def _planned(checked: Checked, prepared: Prepared) -> Run:
    """Show the plan, then check all of it."""
    from openrlhf_bd.driver.progress import console
    from openrlhf_bd.experiments.display import plan_table, some_of
    from openrlhf_bd.experiments.running import check_run, make_run

    run = make_run(prepared.stages, prepared.asked)
    console.print(checked.experiment.title, style="bold", highlight=False, markup=False)
    console.print(plan_table(run))
    for flag in checked.unread:
        console.print(f"warning: no stage of this experiment reads --{flag}", highlight=False, markup=False)
    for warning, names in check_run(run).items():
        console.print(f"warning: {warning} ({some_of(names)})", highlight=False, markup=False)
    return run


def _run(checked: Checked, request: Request) -> None:
    from openrlhf_bd.experiments.digests import CACHE_FILE, InputDigests
    from openrlhf_bd.experiments.prepare import prepare
    from openrlhf_bd.experiments.record import PipelineRecord
    from openrlhf_bd.experiments.running import run_stages

    with PipelineRecord.open(request.output_dir) as record:
        digests = InputDigests(request.output_dir / CACHE_FILE)
        prepared = prepare(checked, request, digests, inputs_dir=request.output_dir)
        digests.save()
        run = _planned(checked, prepared)
        record.set_experiment(
            checked.experiment.name,
            prepared.stages,
            title=checked.experiment.title,
            scale=prepared.scale,
            mode=request.mode,
            published=list(checked.experiment.published),
        )
        run_stages(run, record)
        _report(record, checked.experiment.name)


def _report(record: PipelineRecord, name: str) -> None:
    """The comparison report, and its tables on the terminal."""
    from openrlhf_bd.driver.progress import console
    from openrlhf_bd.evaluation.comparison import write_comparison
    from openrlhf_bd.experiments.scores import CAPTION, score_tables

    view = record.view(name)
    if tables := list(score_tables(view)):
        for table in tables:
            console.print(table)
        console.print(CAPTION, style="dim italic", highlight=False)
    path = record.output_dir / f"{name}.html"
    write_comparison(view, path, record.output_dir / f"{name}_figures")
    console.print(f"report: {path}", highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
