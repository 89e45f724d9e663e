"""`openrlhf-bd list`: the algorithms that `--algo.distill.name` takes here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from openrlhf_bd.cli.flags import main_guard


def main(argv: Sequence[str] | None = None) -> int:
    """Print name, summary and origin of each algorithm. Exit status 2 for an unknown argument."""
    parser = argparse.ArgumentParser(prog="openrlhf-bd list", description="Print the algorithms that can be named.")
    parser.parse_args(sys.argv[1:] if argv is None else argv)
    return main_guard(_print_algorithms)


def _print_algorithms() -> int:
    from rich.console import Console
    from rich.table import Table

    from openrlhf_bd.algorithms.registry import available_algorithms

    table = Table("--algo.distill.name", "what it does", "from")
    for row in available_algorithms():
        table.add_row(*row)
    Console().print(table)
    print('another one: --algo.distill.name package.module:Class, or an entry point in the group "openrlhf.algorithms"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
