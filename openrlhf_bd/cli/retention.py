"""Standard benchmarks through lm-evaluation-harness, which is an extra: pip install 'openrlhf-bd[retention]'.

openrlhf-bd retention RUN_OR_MODEL [RUN_OR_MODEL ...] [--tasks lambada_openai,hellaswag,...] [--include_path DIR]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openrlhf_bd.cli.flags import add_flag, main_guard, section_from_flags
from openrlhf_bd.cli.options import section_options
from openrlhf_bd.config import RetentionOptions
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.paths import looks_like_path, nearest_path_hint

if TYPE_CHECKING:
    from rich.table import Table

    from openrlhf_bd.evaluation.retention import Metric, Retention

_EPILOG = """\
Of a run its student is measured, and retention.json is written into its folder. Of any other model (a folder, or a name
on a hub) <name>.retention.json is written into --output_dir. Tasks that a file has already are not measured again.

examples:
  openrlhf-bd retention runs/bd runs/kd --tasks lambada_openai,hellaswag
  openrlhf-bd retention openai-community/gpt2 --output_dir runs/benchmarks --limit 100
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line of `openrlhf-bd retention`."""
    parser = argparse.ArgumentParser(
        prog="openrlhf-bd retention",
        description="Measure models on standard benchmarks through lm-evaluation-harness.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="RUN_OR_MODEL", help="folder of a run, model folder or hub name")
    parser.add_argument(
        "--output_dir", type=Path, default=None, metavar="DIR", help="folder of the results; without it: the run's"
    )
    group = parser.add_argument_group("benchmarks")
    for option in section_options(RetentionOptions).values():
        add_flag(group, option)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or that of the error whose message it printed."""
    arguments = vars(build_parser().parse_args(argv))
    models, output_dir = arguments.pop("models"), arguments.pop("output_dir")
    return main_guard(lambda: _measure(models, output_dir, section_from_flags(RetentionOptions, arguments)))


def _measure(models: Sequence[str], output_dir: Path | None, options: RetentionOptions) -> int:
    from rich.console import Console

    from openrlhf_bd.evaluation.retention import load_benchmarks, measure_retention

    paths = result_paths(models, output_dir)
    benchmarks = load_benchmarks(options)
    found = {model: measure_retention(model, benchmarks, options, path) for model, path in paths.items()}
    Console().print(_table(found))
    for path in paths.values():
        print(f"written: {path}")
    return 0


def result_paths(models: Sequence[str], output_dir: Path | None) -> dict[str, Path]:
    """Where the results of each model go.

    Raises:
        ConfigError: a model that is no run needs --output_dir; two models would share a file.
        DataError: a folder is not there, or a run has no student yet.
    """
    # Imported where it is used: --help needs none of it.
    from openrlhf_bd.driver.run_folder import RUN_FILE
    from openrlhf_bd.evaluation.retention import RETENTION_FILE

    paths: dict[str, Path] = {}
    for model in models:
        folder = Path(model)
        is_run = (folder / RUN_FILE).is_file()
        if folder.is_dir() and not (folder / "config.json").is_file():
            what = "its student is not trained yet" if is_run else "expected a model or a run with a student"
            raise DataError(f"{folder}: holds no config.json; {what}")
        if not folder.is_dir() and looks_like_path(model):
            raise DataError(f"{folder}: not found{nearest_path_hint(folder)}; expected a model or a run")
        if output_dir is not None:
            name = folder.resolve().name if folder.is_dir() else model.replace("/", "--")
            path = output_dir / f"{name}.{RETENTION_FILE}"
        elif is_run:
            path = folder / RETENTION_FILE
        else:
            raise ConfigError(f"{model}: no run, so nothing says where its results go; name a folder in --output_dir")
        if path in paths.values():
            raise ConfigError(f"{model}: another model's results go to {path} too; measure them into different folders")
        paths[model] = path
    return paths


def _table(found: dict[str, Retention]) -> Table:
    """One line for each metric, one column for each model."""
    from rich import box
    from rich.table import Table

    table = Table("task", "metric", box=box.SIMPLE)
    for model in found:
        table.add_column(model, justify="right")
    lines = dict.fromkeys(
        (task, metric) for item in found.values() for task, metrics in item.tasks.items() for metric in metrics
    )
    for task, metric in lines:
        table.add_row(task, metric, *(_cell(item.tasks.get(task, {}).get(metric)) for item in found.values()))
    return table


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return "n/a"
    return f"{metric.value:.4g}" + (f" ± {metric.stderr:.2g}" if metric.stderr is not None else "")


if __name__ == "__main__":
    sys.exit(main())
