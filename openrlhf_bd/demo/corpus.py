"""The demo corpus: procedural tasks whose answers take several dependent steps.

A record is `{"instruction", "input", "output", "family", "answer"}`, all strings; `input` may be empty. `output` ends
with a marked final answer, and `answer` is that answer alone. Everything is a function of a split and a seed.

The splits are disjoint in their *problems*: a stable hash of the problem, not of its wording, chooses the split.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from openrlhf_bd.demo.tasks import FAMILIES, Family
from openrlhf_bd.demo.tasks.base import canonical, final_answer

# Of 20 hash buckets, one is the test split, one the validation split, and 18 are the train split.
NUM_BUCKETS = 20
SPLIT_BUCKETS: dict[str, range] = {"test": range(1), "validation": range(1, 2), "train": range(2, NUM_BUCKETS)}

Record = dict[str, str]


def bucket_of(family: str, problem: tuple[Any, ...]) -> int:
    """The hash bucket of a problem, the same in every process and release: SHA-256 of its `repr`, modulo 20."""
    digest = hashlib.sha256(f"{family}:{problem!r}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % NUM_BUCKETS


def draw_problem(family: Family, split: str, rng: Random) -> tuple[Any, ...]:
    """A problem of one split, by drawing until the hash agrees.

    Raises:
        ValueError: the split is not "train", "validation" or "test".
    """
    if split not in SPLIT_BUCKETS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLIT_BUCKETS)}")
    while True:
        problem = family.draw(rng)
        if bucket_of(family.name, problem) in SPLIT_BUCKETS[split]:
            return problem


def make_record(family: Family, split: str, rng: Random) -> Record:
    """One record: a problem of the split, written down in a random phrasing and style."""
    draft = family.write(draw_problem(family, split, rng), rng)
    return {
        "instruction": draft.instruction,
        "input": draft.input,
        "output": draft.output,
        "family": family.name,
        "answer": draft.answer,
    }


def choose_families(names: Sequence[str] | None) -> list[Family]:
    """The families of these names, in the fixed order; all of them for None.

    Raises:
        ValueError: no name, or an unknown one.
    """
    known = [family.name for family in FAMILIES]
    if names is None:
        return list(FAMILIES)
    unknown = sorted(set(names) - set(known))
    if unknown or not names:
        raise ValueError(f"families {unknown or 'empty'}: expected some of {', '.join(known)}")
    return [family for family in FAMILIES if family.name in names]


def iter_records(split: str, seed: int | str, families: Sequence[str] | None = None) -> Iterator[Record]:
    """Endless records of one split; the families (all, or those named) take turns at random."""
    rng, chosen = Random(f"{split}:{seed}"), choose_families(families)
    while True:
        yield make_record(rng.choice(chosen), split, rng)


def generate_split(
    split: str, num_records: int, seed: int | str, families: Sequence[str] | None = None
) -> list[Record]:
    """The first `num_records` records of `iter_records(split, seed, families)`."""
    return list(islice(iter_records(split, seed, families), num_records))


def is_correct(record: Mapping[str, Any], response: str) -> bool:
    """Whether a response ends with the record's answer, in any of the styles.

    Only the text after the last marker ("Answer:", "The answer is", "Result:", "Final:") counts; the steps do not.
    """
    return final_answer(response) == canonical(record["answer"])


def as_document(record: Mapping[str, str]) -> str:
    """A record as running text, for a pre-training corpus."""
    return "\n".join(part for part in (record["instruction"], record["input"], record["output"]) if part)


def write_corpus(
    folder: str | Path, *, num_train: int = 6000, num_validation: int = 200, num_test: int = 400, seed: int = 0
) -> dict[str, Path]:
    """Write train.jsonl, validation.jsonl, test.jsonl and pretrain.jsonl.

    pretrain.jsonl holds `{"text"}`: the training records as running text, so that a pre-training term brings no example
    that SFT does not see.

    Args:
        folder: made if it does not exist; files of these names are replaced.
        num_train: records of the train split.
        num_validation: records of the validation split.
        num_test: records of the test split.
        seed: of every random choice.

    Returns:
        The path of each file, by its name without the suffix.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    records = {split: generate_split(split, size, seed) for split, size in sizes.items()}
    paths = {split: write_jsonl(folder / f"{split}.jsonl", rows) for split, rows in records.items()}
    documents = ({"text": as_document(record)} for record in records["train"])
    paths["pretrain"] = write_jsonl(folder / "pretrain.jsonl", documents)
    return paths


def write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """Write one JSON object per line, and return the path."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path
