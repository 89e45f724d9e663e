"""`openrlhf-bd reproduce`: a table or figure of the paper, as the pipeline of its experiment file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from openrlhf_bd.cli.flags import main_guard, parse_arguments
from openrlhf_bd.cli.options import nearest
from openrlhf_bd.cli.pipeline import pipeline_parser, run_experiment
from openrlhf_bd.errors import ConfigError

NAMES = ("table1", "table2", "table3", "table4", "figure1", "figure2")
FOLDER = Path(__file__).parents[2] / "configs" / "paper"
PROG = "openrlhf-bd reproduce"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `openrlhf-bd reproduce`."""
    return main_guard(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    parser = pipeline_parser(PROG, "|".join(NAMES), "Run a table or figure of the paper (docs/reproduce.md).")
    parser.add_argument("name", metavar="NAME", help=", ".join(NAMES), nargs="?")
    arguments = parse_arguments(parser, argv)
    run_experiment(experiment_file(arguments.get("name")), arguments)
    return 0


def experiment_file(name: str | None) -> Path:
    """The experiment file of a table or figure.

    Raises:
        ConfigError: there is none.
    """
    if name not in NAMES:
        guess = nearest(name, NAMES) if name else None
        hint = f"; did you mean {guess}?" if guess else f"; expected {PROG} {'|'.join(NAMES)}"
        raise ConfigError(f"command line: {name or 'nothing'} is no table or figure of the paper{hint}")
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{path}: there is no such file; the experiment files come with a checkout of the repository. Install from "
            "one (pip install -e), or give the file to openrlhf-bd pipeline"
        )
    return path


if __name__ == "__main__":
    raise SystemExit(main())
