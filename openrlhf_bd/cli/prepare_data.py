"""`openrlhf-bd prepare-data`: the data of the paper's experiments at full size, as the folder of `--data`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.errors import RunFolderError

# What the experiments read and this command cannot make, with its form.
_GIVEN = {
    "self_inst": "the user-oriented set of Self-Instruct, 252 records (--self_inst FILE)",
    "vicuna": "the 80 Vicuna questions with reference answers (--vicuna FILE)",
    "pretrain": "OpenWebText: data files whose records have a `text`; for GPT-2 and Qwen2.5",
    "pretrain_opt": "the RoBERTa corpus: data files whose records have a `text`; for OPT",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="openrlhf-bd prepare-data",
        description="Make the data of the paper's experiments at full size: a folder for --data.",
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="folder of the data, for --data")
    for flag, name, what in (
        ("--dolly", "databricks/databricks-dolly-15k", "hub data set, or local file"),
        ("--tokenizer", "openai-community/gpt2", "measures records: folder or hub name"),
    ):
        parser.add_argument(flag, default=name, metavar="NAME", help=f"{what} (default: {name})")
    for flag in ("--self_inst", "--vicuna"):
        parser.add_argument(flag, metavar="FILE", help="file of instruction, input and output; checked and copied")
    for flag, number, what in (
        ("--max_prompt_len", 256, "longest prompt, tokens"),
        ("--max_len", 512, "longest prompt and response together, tokens"),
        ("--num_validation", 500, "validation records"),
        ("--num_test", 500, "test records; as many more are held out"),
        ("--seed", 42, "of the splits"),
    ):
        parser.add_argument(flag, type=int, default=number, metavar="INT", help=f"{what} (default: {number})")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data. Exit status 2 where a file there is another one, or a record is not what it should be."""
    arguments = build_parser().parse_args(argv)
    return main_guard(lambda: _prepare(arguments))


def _prepare(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.output_dir
    texts, notes = _dolly(arguments)
    for name in ("self_inst", "vicuna"):
        if (spec := getattr(arguments, name)) is not None:
            texts[name] = _checked(spec, option=f"--{name}")
    _refuse_others(folder, texts)
    folder.mkdir(parents=True, exist_ok=True)
    print("\n".join(notes))
    for name, text in texts.items():
        _write(folder / f"{name}.jsonl", text)
    for name, what in _GIVEN.items():
        if not (folder / name).exists() and not (folder / f"{name}.jsonl").exists():
            where = folder / (name if name.startswith("pretrain") else f"{name}.jsonl")
            print(f"{where}: still missing: {what}")
    return 0


def _dolly(arguments: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """Text of each file that Dolly makes, and what was left out."""
    from openrlhf_bd.config import Config
    from openrlhf_bd.data.sources import load_records
    from openrlhf_bd.driver.models import load_tokenizer
    from openrlhf_bd.experiments.paper_data import Limits, as_jsonl, keep_usable, split

    source = load_records(arguments.dolly, split="train", max_samples=int(1e8), probs=None, option="--dolly")
    tokenizer = load_tokenizer(arguments.tokenizer, Config())
    limits = Limits(arguments.max_prompt_len, arguments.max_len)
    kept = keep_usable(source, tokenizer, limits)
    splits = split(
        kept.records, seed=arguments.seed, num_validation=arguments.num_validation, num_test=arguments.num_test
    )
    note = (
        f"{arguments.dolly}: {len(source):,} records; left out: {kept.num_overlong:,} with more than "
        f"{limits.max_prompt_len} tokens of prompt or {limits.max_len} in all, {kept.num_repeated:,} that came before"
    )
    parts = {
        "train": splits.train,
        "validation": splits.validation,
        "dolly": splits.test,
        "dolly_rest": splits.test_rest,
    }
    return {name: as_jsonl(records) for name, records in parts.items()}, [note]


def _checked(spec: str, *, option: str) -> str:
    """A test set's records as JSONL, each seen to have instruction and output."""
    from openrlhf_bd.data.sources import load_records
    from openrlhf_bd.experiments.paper_data import as_jsonl, fields_of

    source = load_records(spec, split="test", max_samples=int(1e8), probs=None, option=option)
    return as_jsonl(fields_of(record) for record in source)


def _refuse_others(folder: Path, texts: Mapping[str, str]) -> None:
    """Nothing that is there is replaced by something else."""
    for name, text in texts.items():
        path = folder / f"{name}.jsonl"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise RunFolderError(
                f"{path}: is there with other records; give another --output_dir, or move the file away. Nothing was "
                "written"
            )


def _write(path: Path, text: str) -> None:
    from openrlhf_bd.store.files import write_text

    if path.exists():
        print(f"{path}: there already, the same {text.count(chr(10)):,} records")
        return
    write_text(path, text)
    print(f"{path}: {text.count(chr(10)):,} records")


if __name__ == "__main__":
    raise SystemExit(main())
