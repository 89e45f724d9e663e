"""A damaged store is mended: whole shards stay, and exactly the rows of the others are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from openrlhf_bd.errors import RunFolderError, StoreError
from openrlhf_bd.store import StoreReader, StoreWriter, verify_store
from openrlhf_bd.store.repair import take_out_damaged
from tests.unit.store.rows import assert_same_rollout, teacher_manifest, teacher_rows


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Twenty rows in four shards of five."""
    with StoreWriter(tmp_path / "store", teacher_manifest(), rows_per_shard=5) as writer:
        writer.append(teacher_rows())
    return tmp_path / "store"


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.parquet")}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_whole_store_is_left_alone(store: Path) -> None:
    """Nothing is damaged, nothing changes."""
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    repair = take_out_damaged(store)
    assert (repair.num_rows, repair.unlisted) == (0, ())
    assert {path.name: path.read_bytes() for path in store.iterdir()} | {".lock": b""} == before | {".lock": b""}
    assert StoreReader(store).complete


def test_rows_of_damaged_shards_are_made_again(store: Path) -> None:
    """One shard with a flipped bit, one cut, one missing: the fourth stays byte for byte, fifteen rows are missing."""
    whole = shard_bytes(store)
    flip_a_bit(store / "shard-00000.parquet")
    (store / "shard-00001.parquet").write_bytes(whole["shard-00001.parquet"][:-100])
    (store / "shard-00003.parquet").unlink()
    with pytest.raises(StoreError, match="--repair"):
        StoreReader(store)

    repair = take_out_damaged(store)
    assert [entry.file for entry in repair.damaged] == [f"shard-0000{shard}.parquet" for shard in (0, 1, 3)]
    assert repair.num_rows == 15
    assert sorted(path.name for path in (store / "damaged").iterdir()) == [
        "shard-00000.parquet.0",
        "shard-00001.parquet.0",
    ]
    with StoreWriter(store, teacher_manifest(), rows_per_shard=5) as writer:
        assert len(writer.completed_row_ids()) == 5
        assert writer.append(teacher_rows()) == 15
    reader = StoreReader(store)
    verify_store(reader.path)
    for row, again in zip(teacher_rows(), reader.rollouts(range(20)), strict=True):
        assert_same_rollout(row, again)
    after = shard_bytes(store)
    assert after["shard-00002.parquet"] == whole["shard-00002.parquet"]
    # New shards come after the last whole one.
    assert set(after) == {f"shard-0000{shard}.parquet" for shard in (2, 3, 4, 5)}


def test_foreign_shard_is_taken_out(store: Path) -> None:
    """A file that the manifest does not list goes aside, and the store is complete as before."""
    (store / "shard-00009.parquet").write_bytes((store / "shard-00000.parquet").read_bytes())
    assert take_out_damaged(store).unlisted == ("shard-00009.parquet",)
    assert len(StoreReader(store)) == 20


def test_store_that_is_written_to_is_not_repaired(tmp_path: Path) -> None:
    """Another process has the store: refused, nothing changed."""
    writer = StoreWriter(tmp_path / "store", teacher_manifest())
    with pytest.raises(RunFolderError, match="one writer at a time"):
        take_out_damaged(tmp_path / "store")
    writer.suspend()
