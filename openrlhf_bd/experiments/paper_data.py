"""The paper's data from databricks-dolly-15k (section "Training"): which records are kept, and the splits.

A record is `{"instruction", "input", "output"}`: all texts, of which `input` alone may be empty.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from openrlhf_bd.data.fields import text_field
from openrlhf_bd.data.readers import Record
from openrlhf_bd.data.templates import format_prompt
from openrlhf_bd.errors import DataError

INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"
# As the data set itself names them.
_DOLLY_NAMES = {"context": INPUT, "response": OUTPUT}
_BATCH_SIZE = 1024

Fields = dict[str, str]


@dataclass(frozen=True, slots=True)
class Limits:
    """What fits into a context.

    Attributes:
        max_prompt_len: longest prompt in the paper's wrapper, tokens.
        max_len: longest prompt and response together, with the token that ends it.
    """

    max_prompt_len: int
    max_len: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Records that can be used, and how many cannot."""

    records: list[Fields]
    num_overlong: int
    num_repeated: int


@dataclass(frozen=True, slots=True)
class Splits:
    """Disjoint parts of Dolly. The paper holds 1,000 records out for testing, and evaluates on 500 (DollyEval)."""

    train: list[Fields]
    validation: list[Fields]
    test: list[Fields]
    test_rest: list[Fields]


def fields_of(record: Record) -> Fields:
    """Instruction, input and output of a record, under the names that Dolly gives them or under ours.

    Raises:
        DataError: one is missing, or no text; the message names file and line.
    """
    renamed = {_DOLLY_NAMES.get(key, key): value for key, value in record.values.items()}
    record = Record({INPUT: "", **renamed}, record.where)
    return {
        name: text_field(record, name, option="the keys instruction, input and output", allow_empty=name == INPUT)
        for name in (INSTRUCTION, INPUT, OUTPUT)
    }


def keep_usable(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Kept:
    """The records that fit into the context, each instruction with its input once.

    An instruction that comes twice could stand in two splits.

    Raises:
        DataError: see `fields_of`.
    """
    kept: dict[tuple[str, str], Fields] = {}
    num_overlong = num_repeated = 0
    iterator = iter(records)
    while batch := [fields_of(record) for record in islice(iterator, _BATCH_SIZE)]:
        for fields, fits in zip(batch, _fits(batch, tokenizer, limits), strict=True):
            name = (fields[INSTRUCTION], fields[INPUT])
            num_overlong += not fits
            num_repeated += fits and name in kept
            if fits:
                kept.setdefault(name, fields)
    return Kept(list(kept.values()), num_overlong, num_repeated)


def _fits(batch: Sequence[Fields], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> list[bool]:
    prompts = tokenizer([format_prompt(fields[INSTRUCTION], fields[INPUT]) for fields in batch], verbose=False)
    outputs = tokenizer([fields[OUTPUT] for fields in batch], add_special_tokens=False, verbose=False)
    return [
        len(prompt) <= limits.max_prompt_len and len(prompt) + len(output) + 1 <= limits.max_len
        for prompt, output in zip(prompts.input_ids, outputs.input_ids, strict=True)
    ]


def split(records: Sequence[Fields], *, seed: int, num_validation: int = 500, num_test: int = 500) -> Splits:
    """Random disjoint splits, the same for the same records and seed.

    Args:
        records: to be split.
        seed: of the order in which they are drawn.
        num_validation: records of the validation split.
        num_test: records of the test split, and as many more that are held out and not used.

    Raises:
        DataError: there are too few records.
    """
    held_out = num_validation + 2 * num_test
    if len(records) <= held_out:
        raise DataError(
            f"{len(records)} records are left, and {held_out} are held out for validation and test; expected more, so "
            "that some are left to train on"
        )
    order = random.Random(seed).sample(range(len(records)), len(records))
    drawn = [records[index] for index in order]
    ends = [num_validation, num_validation + num_test, held_out]
    return Splits(
        validation=drawn[: ends[0]],
        test=drawn[ends[0] : ends[1]],
        test_rest=drawn[ends[1] : ends[2]],
        train=drawn[held_out:],
    )


def as_jsonl(records: Iterable[Fields]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in records)
