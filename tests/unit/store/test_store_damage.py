"""Damage to a store is found, and the message names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openrlhf_bd.errors import StoreError
from openrlhf_bd.store import StoreReader, StoreWriter, verify_store
from openrlhf_bd.store.fingerprints import fingerprint_json
from openrlhf_bd.store.shard_file import RowGroup
from tests.unit.store.rows import assert_same_rollout, teacher_manifest, teacher_rows

SHARD = "shard-00001.parquet"
RESPONSE_IDS = 7


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A complete store of 20 rows in five shards."""
    path = tmp_path / "store"
    with StoreWriter(path, teacher_manifest(), rows_per_shard=4) as writer:
        writer.append(teacher_rows())
    return path


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_whole_store_verifies(store: Path) -> None:
    """A store that nobody touched passes."""
    verify_store(store)


def test_truncated_shard(store: Path) -> None:
    """A shard that was cut is refused when the store is opened, with found and expected size."""
    content = (store / SHARD).read_bytes()
    (store / SHARD).write_bytes(content[:-100])
    with pytest.raises(
        StoreError, match=rf"{SHARD}: {len(content) - 100} bytes, expected {len(content)}; .*\(4 rows: "
    ):
        StoreReader(store)


def test_missing_shard(store: Path) -> None:
    """A listed shard that is gone is refused when the store is opened, and by a writer."""
    (store / SHARD).unlink()
    with pytest.raises(StoreError, match=f"{SHARD}: missing"):
        StoreReader(store)
    with pytest.raises(StoreError, match=f"{SHARD}: missing"):
        StoreWriter(store, teacher_manifest())


def test_all_damage_is_named_with_its_rows(store: Path) -> None:
    """Shards cut, gone and changed are all named at once, each with the ids of its rows, long lists shortened."""
    cut, gone, changed = (store / f"shard-0000{number}.parquet" for number in (0, 2, 4))
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    flip(changed, changed.stat().st_size // 2)
    ids = [row.row_id for row in teacher_rows()]
    with pytest.raises(StoreError) as caught:
        verify_store(store)
    *lines, remedy = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(cut), str(gone), str(changed)]
    for line, first in zip(lines, (0, 8, 16), strict=True):
        assert line.endswith(f"(4 rows: {', '.join(ids[first : first + 4])})")
    assert "openrlhf-bd inspect PATH --repair" in remedy
    # Without reading every byte the first two are seen, by a reader and by a writer.
    for opened in (StoreReader, lambda path: StoreWriter(path, teacher_manifest())):
        with pytest.raises(StoreError) as caught:
            opened(store)
        assert str(caught.value).splitlines()[:-1] == lines[:2]


def test_many_rows_of_a_damaged_shard_are_shortened(tmp_path: Path) -> None:
    """Of a large shard the first rows and the last are named."""
    with StoreWriter(tmp_path, teacher_manifest()) as writer:
        writer.append(teacher_rows())
    (tmp_path / "shard-00000.parquet").unlink()
    ids = [row.row_id for row in teacher_rows()]
    with pytest.raises(StoreError, match=rf"\(20 rows: {', '.join(ids[:3])}, \.\.\., {ids[-1]}\)"):
        StoreReader(tmp_path)


def test_every_flipped_bit_is_found(store: Path) -> None:
    """Wherever a bit flips, reading gives an error that names the file, or the right rows; `verify` always finds it."""
    original = (store / SHARD).read_bytes()
    random = np.random.default_rng(0)
    outcomes = []
    for position in range(0, len(original), 7):
        flip(store / SHARD, position, int(random.integers(8)))
        outcomes.append(finding_when_read(store))
        (store / SHARD).write_bytes(original)
    found = [finding for finding in outcomes if finding is not None]
    assert all(SHARD in finding for finding in found)
    # Pages, nearly all of a real shard, carry checksums. Not every byte of Parquet's own headers means something.
    assert len(found) > len(outcomes) // 2

    reader = StoreReader(store)
    flip(store / SHARD, len(original) // 2)
    with pytest.raises(StoreError, match=f"{SHARD}: its content is not what was sealed"):
        verify_store(reader.path)


def finding_when_read(store: Path) -> str | None:
    """The error of reading the rows of SHARD, or None where they are right."""
    try:
        found = StoreReader(store).rollouts(range(4, 8))
    except StoreError as error:
        return str(error)
    for row, right in zip(found, teacher_rows()[4:8], strict=True):
        assert_same_rollout(row, right)
    return None


def test_damage_names_the_rows(store: Path) -> None:
    """An error in the middle of reading says which rows of which file are lost."""
    reader = StoreReader(store)
    pages = pq.ParquetFile(store / SHARD).metadata.row_group(0).column(RESPONSE_IDS)
    flip(store / SHARD, pages.data_page_offset + pages.total_compressed_size - 1)
    assert len(reader.rollouts(range(4))) == 4
    with pytest.raises(StoreError, match=rf"{SHARD}: damaged \(rows 0 to 3 of this file\)"):
        StoreReader(store).rollouts([5])


def test_foreign_shards(store: Path, tmp_path: Path) -> None:
    """A shard of another store is refused, in the place of a shard of this one or beside them."""
    other = tmp_path / "other"
    with StoreWriter(other, teacher_manifest(), rows_per_shard=4) as writer:
        writer.append(teacher_rows())
    kept = (store / SHARD).read_bytes()
    shutil.copy(other / SHARD, store / SHARD)
    with pytest.raises(StoreError, match=f"{SHARD}: (a shard of store|[0-9]+ bytes, expected)"):
        StoreReader(store).rollouts(range(20))
    (store / SHARD).write_bytes(kept)

    shutil.copy(other / SHARD, store / "shard-00099.parquet")
    with pytest.raises(StoreError, match=r"shard-00099\.parquet: the store does not list this shard"):
        StoreReader(store)
    with pytest.raises(StoreError, match=r"shard-00099\.parquet"):
        StoreWriter(store, teacher_manifest())
    assert (store / "shard-00099.parquet").exists()


def test_foreign_shard_of_the_same_size(store: Path) -> None:
    """The owner is written in the shard: equal size and number of rows don't help a foreign one."""
    rewrite_manifest(store, store_id="f" * 32)
    with pytest.raises(StoreError, match=r"shard-00000\.parquet: a shard of store '[0-9a-f]{32}', expected"):
        StoreReader(store).rollouts([0])


def test_same_row_in_two_shards(store: Path) -> None:
    """Rows that are there twice are noticed."""
    lines = journal_lines(store)
    shutil.copy(store / SHARD, store / "shard-00005.parquet")
    again = json.loads(lines[1])
    again["shard"]["file"] = "shard-00005.parquet"
    (store / "shards.jsonl").write_bytes(b"".join([*lines, with_checksum(again)]))
    rewrite_manifest(store, sealed_shards=6)
    with pytest.raises(StoreError, match="row 'train:2:0' is there twice"):
        StoreReader(store)


def rewrite_manifest(store: Path, **changes: object) -> None:
    content = json.loads((store / "manifest.json").read_text(encoding="utf-8")) | changes
    (store / "manifest.json").write_bytes(with_checksum(content))


def with_checksum(content: dict[str, Any]) -> bytes:
    content = {key: value for key, value in content.items() if key != "checksum"}
    return json.dumps(content | {"checksum": fingerprint_json(content)}).encode() + b"\n"


def journal_lines(store: Path) -> list[bytes]:
    return (store / "shards.jsonl").read_bytes().splitlines(keepends=True)


def manifest_damages() -> Iterator[tuple[str, bytes | None, str]]:
    yield "gone", None, "not found; expected a store"
    yield "empty", b"", "not JSON"
    yield "binary", bytes(range(128, 256)), "not JSON"
    yield "list", b"[]", "not a JSON object"
    yield "edited", b'{"format_version": 1, "checksum": "0"}', "its checksum is '0'"
    yield "newer", b'{"format_version": 3}', "format version 3, expected 2"


@pytest.mark.parametrize(("content", "finding"), [case[1:] for case in manifest_damages()])
def test_damaged_manifest(store: Path, content: bytes | None, finding: str) -> None:
    """A manifest that is gone, damaged, edited or of another version is refused by name."""
    (store / "manifest.json").unlink()
    if content is not None:
        (store / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=f"manifest.json.*{finding}"):
        StoreReader(store)


def test_malformed_manifest_with_a_right_checksum(store: Path) -> None:
    """A manifest of the right version with other keys is refused, not half understood."""
    rewrite_manifest(store, quarantined=[{"row_id": "train:0:0"}])
    with pytest.raises(StoreError, match=r"manifest\.json: damaged.*\n.*reason"):
        StoreReader(store)


def test_tokens_that_do_not_give_their_hash(store: Path) -> None:
    """Token ids other than those that were recorded are refused by name of the row, whoever wrote them."""
    table = pq.read_table(store / SHARD)
    names, hashes = table["row_id"].to_pylist(), table["token_hash"].to_pylist()
    hashes[2] ^= 1
    column = pa.array(hashes, pa.uint64())
    group = RowGroup(table.set_column(table.column_names.index("token_hash"), "token_hash", column), store / SHARD)
    assert group.rollout(1).row_id == names[1]
    with pytest.raises(StoreError, match=f"{SHARD}: row '{names[2]}': its token ids do not give its hash"):
        group.rollout(2)


def test_sets_that_are_too_few_for_the_tokens(store: Path) -> None:
    """A row with fewer sets than response tokens is refused by name, with both numbers."""
    table = pq.read_table(store / SHARD)
    names, sizes = table["row_id"].to_pylist(), table["set_sizes"].to_pylist()
    masses, ids, logprobs = (table[name].to_pylist() for name in ("neg_log_mass", "set_ids", "set_logprobs"))
    num_tokens = table["response_length"].to_pylist()[3]
    kept = sizes[3][: num_tokens - 1]
    sizes[3], masses[3], ids[3], logprobs[3] = (
        kept,
        masses[3][: len(kept)],
        ids[3][: sum(kept)],
        logprobs[3][: sum(kept)],
    )
    for name, lists in (("set_sizes", sizes), ("neg_log_mass", masses), ("set_ids", ids), ("set_logprobs", logprobs)):
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(lists, table.schema.field(place).type))
    with pytest.raises(StoreError, match=f"row '{names[3]}': found {num_tokens - 1} candidate sets, expected"):
        RowGroup(table, store / SHARD).rollout(3)
