"""Compact tables give back what was put in, however much that is."""

from __future__ import annotations

import numpy as np
import pytest

from openrlhf_bd.store import columns
from openrlhf_bd.store.columns import Column, RowIds, ShardTable, is_shard_name, shard_name, shard_number
from openrlhf_bd.store.manifest import ShardEntry


@pytest.mark.parametrize("same_hash", [False, True])
def test_ids_are_found(monkeypatch: pytest.MonkeyPatch, same_hash: bool) -> None:
    """Ids added in parts keep their numbers, and are found before and after they move to the sorted arrays."""
    monkeypatch.setattr(columns, "_RECENT_IDS", 16)
    if same_hash:
        # The worst that can happen: the text decides each time.
        monkeypatch.setattr(columns, "hash", lambda _: 7, raising=False)
    expected = [f"é:{number * 7919 % 100}" for number in range(100)]
    row_ids = RowIds(expected[:5])
    for start in range(5, 100, 5):
        row_ids.extend(expected[start : start + 5])
        known = expected[: start + 5]
        assert row_ids.find(known).tolist() == list(range(len(known)))
        assert row_ids.find(["é:", "é:100", "é"]).tolist() == [-1, -1, -1]
    assert row_ids == expected
    assert list(row_ids) == expected
    assert (row_ids[3], row_ids[-1], row_ids[98:]) == (expected[3], expected[99], expected[98:])
    assert "é:5" in row_ids
    assert "é:500" not in row_ids
    assert 5 not in row_ids
    with pytest.raises(IndexError):
        row_ids[100]


def test_column_grows() -> None:
    """Values come back in order; what was taken out before does not change."""
    column = Column(np.int32)
    parts = [np.arange(size, dtype=np.int32) for size in (0, 1, 5, 2, 40)]
    column.extend(parts[1])
    first = column.values
    for part in parts[2:]:
        column.extend(part)
    assert column.values.tolist() == [0, 0, 1, 2, 3, 4, 0, 1, *range(40)]
    assert first.tolist() == [0]
    column.reorder(np.arange(len(column))[::-1])
    assert column.values[:2].tolist() == [39, 38]


def test_shards_come_back() -> None:
    """An entry is kept to the last digit of its hashes."""
    entries = [
        ShardEntry(
            file=shard_name(number),
            num_rows=number + 1,
            num_prompt_tokens=2**40,
            num_response_tokens=3,
            num_states=4,
            num_candidates=2**41,
            size_bytes=2**42,
            sha256=f"{number:064x}",
            footer_sha256="0" * 62 + "ff",
        )
        for number in (0, 7, 123_456)
    ]
    table = ShardTable()
    assert table.last_number == -1
    for entry in entries:
        table.append(entry)
    assert list(table) == entries
    assert (len(table), table.size_bytes, table.last_number) == (3, 3 * 2**42, 123_456)


def test_names_of_shards() -> None:
    """Five digits, more where they are needed; nothing else is a shard."""
    assert (shard_name(7), shard_name(100_000)) == ("shard-00007.parquet", "shard-100000.parquet")
    assert shard_number("shard-100000.parquet") == 100_000
    for name in ("shard-7.parquet", "shard-000007.parquet", "shard-00007.parquet.tmp", "shard-0000x.parquet", "shard"):
        assert not is_shard_name(name)
        with pytest.raises(ValueError, match="not named like a shard"):
            shard_number(name)
