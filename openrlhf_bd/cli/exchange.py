"""A store of rows as a Hugging Face data set, and back.

openrlhf-bd export STORE FOLDER
openrlhf-bd import FOLDER STORE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.errors import DataError
from openrlhf_bd.store.exchange import export_dataset, import_dataset


def build_parser() -> argparse.ArgumentParser:
    """The command line of `openrlhf-bd export` and `openrlhf-bd import`."""
    parser = argparse.ArgumentParser(prog="openrlhf-bd", description="A store as a Hugging Face data set, and back.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a store as a data set folder (datasets.load_from_disk)")
    export.add_argument("store", help="folder of a complete store")
    export.add_argument("folder", type=Path, help="folder of the data set, made here")
    bring = commands.add_parser("import", help="make a store of a data set that export wrote")
    bring.add_argument("folder", type=Path, help="folder of the data set")
    bring.add_argument("store", help="folder of the store, or its URL, made here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or that of the error whose message it printed."""
    options = build_parser().parse_args(argv)
    return main_guard(lambda: _export(options) if options.command == "export" else _import(options))


def _export(options: argparse.Namespace) -> int:
    num_rows = export_dataset(options.store, options.folder)
    print(f"{num_rows:,} rows: {options.folder}")
    return 0


def _import(options: argparse.Namespace) -> int:
    # Imported where it is used: --help needs no data sets.
    from datasets import load_from_disk

    try:
        source = load_from_disk(str(options.folder))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{options.folder}: no data set could be loaded there ({error})") from error
    num_rows = import_dataset(source, options.store)
    print(f"{num_rows:,} rows: {options.store}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
