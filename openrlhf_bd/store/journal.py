"""`shards.jsonl`: which shards are sealed, one line each, only ever appended to.

    {"shard": {"file": "shard-00000.parquet", "num_rows": 2, ...}, "rows": {"row_ids": [...], ...}, "checksum": "..."}

A shard's rows exist from the moment its line is whole. A last line without a line break is what a crash left of one: it
does not count, and the next line takes its place. Sealing a shard costs the same however many there are, and the rows'
ids and lengths in the lines make opening a store of many small shards fast: no shard is touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from openrlhf_bd.errors import StoreError
from openrlhf_bd.store.columns import shard_number
from openrlhf_bd.store.fingerprints import fingerprint_json
from openrlhf_bd.store.folder import StoreFolder
from openrlhf_bd.store.manifest import REMEDY, ShardEntry, StoreState

JOURNAL_FILE = "shards.jsonl"


class ShardRows(BaseModel):
    """What is known of a shard's rows without reading it. One entry a row, in the shard's order.

    Attributes:
        row_ids: of each row.
        prompt_lengths: prompt tokens.
        response_lengths: response tokens.
        num_states: states with a candidate set.
        steps: optimizer steps, in stores of online runs; None in others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    row_ids: list[str]
    prompt_lengths: list[int]
    response_lengths: list[int]
    num_states: list[int]
    steps: list[int] | None = None


class SealedShard(BaseModel):
    """A line of the journal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: ShardEntry
    rows: ShardRows

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        rows, expected = self.rows, self.shard.num_rows
        shard_number(self.shard.file)
        columns = (rows.row_ids, rows.prompt_lengths, rows.response_lengths, rows.num_states, rows.steps)
        counts = {len(column) for column in columns if column is not None}
        if counts != {expected}:
            raise ValueError(f"{self.shard.file}: {sorted(counts)} rows, expected {expected}")
        return self

    def line(self) -> bytes:
        """As it stands in the journal."""
        content = self.model_dump(mode="json", exclude_none=True)
        text = json.dumps(content | {"checksum": fingerprint_json(content)}, ensure_ascii=False, separators=(",", ":"))
        return f"{text}\n".encode()


class Journal:
    """The journal of one store, read or written from where the last read or write ended.

    Attributes:
        num_lines: lines read or written so far.
    """

    def __init__(self, folder: StoreFolder) -> None:
        self._folder = folder
        self._end = self.num_lines = 0

    def read(self, *, skip_damaged: bool = False) -> Iterator[SealedShard]:
        """Lines that were not read yet.

        Args:
            skip_damaged: leave damaged lines out, for a repair.

        Raises:
            StoreError: a line is damaged, or the journal is shorter than it was.
        """
        for line in self._folder.lines(JOURNAL_FILE, self._end):
            if not line.endswith(b"\n"):
                return
            try:
                sealed = _parse(line)
            except (ValueError, ValidationError) as error:
                if not skip_damaged:
                    raise StoreError(
                        f"{self._folder}/{JOURNAL_FILE}, line {self.num_lines + 1}: damaged or edited by hand: "
                        f"{error}; {REMEDY}"
                    ) from None
                sealed = None
            self._end += len(line)
            self.num_lines += 1
            if sealed is not None:
                yield sealed

    def append(self, sealed: SealedShard) -> None:
        """Add a line after the last one that was read or written.

        Raises:
            OSError: the disk is full or failing; what a next attempt writes takes the place of this line.
        """
        line = sealed.line()
        self._folder.append(JOURNAL_FILE, line, position=self._end)
        self._end += len(line)
        self.num_lines += 1

    def fault(self, state: StoreState) -> str | None:
        """How the lines read differ from what the manifest says of them, in words, or None."""
        found, expected = self.num_lines, state.sealed_shards
        if found < expected or (state.complete and found > expected):
            return f"{found} shards, expected {expected}, as the manifest says; it was cut, or copied apart from it"
        return None

    def require_lines_of(self, state: StoreState) -> None:
        """Refuse a journal that does not fit the manifest.

        Raises:
            StoreError: lines are missing, or there are more than a complete store had.
        """
        if fault := self.fault(state):
            raise StoreError(f"{self._folder}/{JOURNAL_FILE}: {fault}; {REMEDY}")


def _parse(line: bytes) -> SealedShard:
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    found, expected = content.pop("checksum", None), fingerprint_json(content)
    if found != expected:
        raise ValueError(f"its checksum is {found!r}, its content gives {expected!r}")
    return SealedShard.model_validate(content)
