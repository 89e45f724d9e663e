"""Pre-training text (J_PT): tokenised once, joined by the end-of-sequence token and cut into blocks of one length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.data.fields import text_field
from openrlhf_bd.data.sources import Source, load_records
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.store.files import seal, temporary_name, write_text
from openrlhf_bd.store.fingerprints import fingerprint_tokenizer

_OPTION = "--data.pretrain_dataset"
# Tokenised at once; the tokenizer holds some hundred bytes for each token meanwhile.
_CHARACTERS_PER_BATCH = 1_000_000


def open_pretrain(config: Config) -> Source:
    """The records of `--data.pretrain_dataset`.

    Raises:
        ConfigError: none is named.
        DataError: see `load_records`.
    """
    spec = config.data.pretrain_dataset
    if spec is None:
        raise ConfigError(f"{_OPTION} is not given; name the pre-training text")
    return load_records(
        spec, split=config.data.pretrain_split, max_samples=config.data.max_samples, probs=None, option=_OPTION
    )


def write_pretrain_blocks(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    block_len: int,
    *,
    max_blocks: int | None = None,
) -> int:
    """Write the pre-training text as a `.npy` of shape [num_blocks, block_len], int32, which ranks map into memory.

    A file of the same text, tokenizer and block length is used again: `<path>.json` beside it says what it holds.
    The file appears under its name only when it is whole.

    Args:
        config: `data.pretrain_dataset`, `data.pretrain_split`, `data.pretrain_key`, `data.max_samples`.
        tokenizer: of the student.
        path: where to write.
        block_len: tokens of a block. Tokens after the last full block are left out.
        max_blocks: stop after so many blocks; None takes all of the text.

    Returns:
        num_blocks, at least 1.

    Raises:
        ConfigError, DataError: see `open_pretrain`; a record lacks its text; the text is shorter than a block.
    """
    source = open_pretrain(config)
    identity = {
        "data": source.fingerprint(),
        "key": config.data.pretrain_key,
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "block_len": block_len,
        "max_blocks": max_blocks,
    }
    sidecar = path.with_name(path.name + ".json")
    if path.exists() and sidecar.exists():
        found = json.loads(sidecar.read_text(encoding="utf-8"))
        if found["identity"] == identity:
            return int(found["num_blocks"])
    path.parent.mkdir(parents=True, exist_ok=True)
    # Between the two files there is a moment without a description, never one with a wrong one.
    sidecar.unlink(missing_ok=True)
    with temporary_name(path).open("wb") as file:
        num_blocks = _write_blocks(file, _token_runs(source, config, tokenizer), block_len, max_blocks)
        if num_blocks == 0:
            raise DataError(
                f"{config.data.pretrain_dataset}: has fewer tokens than one block of {block_len}; "
                f"give more text, or lower the length of blocks ({_OPTION})"
            )
    seal(path)
    write_text(sidecar, json.dumps({"identity": identity, "num_blocks": num_blocks}))
    return num_blocks


def check_pretrain(config: Config, *, num_records: int) -> int:
    """Look at the first records of the pre-training text.

    Returns:
        How many records there are.

    Raises:
        ConfigError, DataError: as `write_pretrain_blocks`; none of the first records has any text.
    """
    source = open_pretrain(config)
    texts = [
        text_field(record, config.data.pretrain_key, option="--data.pretrain_key", allow_empty=True)
        for record in islice(source, num_records)
    ]
    if not any(text.strip() for text in texts):
        raise DataError(f"{config.data.pretrain_dataset}: its first records have no text (see --data.pretrain_key)")
    return len(source)


def _token_runs(source: Source, config: Config, tokenizer: PreTrainedTokenizerBase) -> Iterator[NDArray[np.int32]]:
    """Tokens of each text with the end-of-sequence token after them. Empty texts are skipped."""
    texts: list[str] = []
    num_characters = 0
    for record in source:
        text = text_field(record, config.data.pretrain_key, option="--data.pretrain_key", allow_empty=True)
        if text.strip():
            texts.append(text)
            num_characters += len(text)
        if num_characters >= _CHARACTERS_PER_BATCH:
            yield from _encode(texts, tokenizer)
            texts, num_characters = [], 0
    if texts:
        yield from _encode(texts, tokenizer)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[NDArray[np.int32]]:
    # Text that spells a special token stays text: only the joints are ends of sequence.
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    return (np.asarray([*ids, tokenizer.eos_token_id], dtype="<i4") for ids in encoded)


def _write_blocks(file: BinaryIO, runs: Iterator[NDArray[np.int32]], block_len: int, max_blocks: int | None) -> int:
    """Stream blocks behind a header that is written twice: numpy leaves room in it for the number of blocks to grow."""
    _write_header(file, 0, block_len)
    header_bytes = file.tell()
    num_blocks, pending = 0, np.empty(0, dtype="<i4")
    for run in runs:
        pending = np.concatenate([pending, run])
        count = len(pending) // block_len
        if max_blocks is not None:
            count = min(count, max_blocks - num_blocks)
        file.write(pending[: count * block_len].tobytes())
        pending = pending[count * block_len :]
        num_blocks += count
        if num_blocks == max_blocks:
            break
    file.seek(0)
    _write_header(file, num_blocks, block_len)
    if file.tell() != header_bytes:
        raise AssertionError(f"the header grew from {header_bytes} to {file.tell()} bytes")
    return num_blocks


def _write_header(file: BinaryIO, num_blocks: int, block_len: int) -> None:
    description = {"descr": "<i4", "fortran_order": False, "shape": (num_blocks, block_len)}
    np.lib.format.write_array_header_1_0(file, description)
