"""The list of sealed shards: appended to, checked line by line, mended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from openrlhf_bd.cli.inspect_store import main as inspect_main
from openrlhf_bd.errors import StoreError
from openrlhf_bd.store import StoreReader, StoreWriter, verify_store
from openrlhf_bd.store.fingerprints import fingerprint_json
from openrlhf_bd.store.repair import take_out_damaged
from tests.unit.store.deaths import whole_lines
from tests.unit.store.rows import assert_same_rollout, teacher_manifest, teacher_rows


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A complete store of 20 rows in five shards."""
    with StoreWriter(tmp_path / "store", teacher_manifest(), rows_per_shard=4) as writer:
        writer.append(teacher_rows())
    return tmp_path / "store"


def finish(store: Path) -> None:
    """Make the missing rows, and see that all are there."""
    with StoreWriter(store, teacher_manifest(), rows_per_shard=4) as writer:
        writer.append(teacher_rows())
    reader = StoreReader(store)
    verify_store(reader.path)
    for found, expected in zip(reader.rollouts(range(20)), teacher_rows(), strict=True):
        assert_same_rollout(found, expected)


def test_lines_say_what_the_shards_hold(store: Path) -> None:
    """A line has a shard's counts, its rows' ids and lengths, and a checksum that anybody can compute."""
    line = whole_lines(store)[1]
    assert line["shard"]["file"] == "shard-00001.parquet"
    assert line["shard"]["num_rows"] == 4
    assert line["shard"]["size_bytes"] == (store / "shard-00001.parquet").stat().st_size
    rows = teacher_rows()[4:8]
    assert line["rows"]["row_ids"] == [row.row_id for row in rows]
    assert line["rows"]["prompt_lengths"] == [4] * 4
    assert line["rows"]["response_lengths"] == [5] * 4
    assert line["rows"]["num_states"] == [5] * 4
    assert line.pop("checksum") == fingerprint_json(line)


def test_sealing_appends(tmp_path: Path) -> None:
    """A shard more costs its own line: nothing written before is written again."""
    writer = StoreWriter(tmp_path, teacher_manifest(), rows_per_shard=4)
    writer.append(teacher_rows()[:4])
    manifest, journal = (tmp_path / "manifest.json").read_bytes(), (tmp_path / "shards.jsonl").read_bytes()
    inode = (tmp_path / "shards.jsonl").stat().st_ino
    writer.append(teacher_rows()[:12])
    assert (tmp_path / "manifest.json").read_bytes() == manifest
    assert (tmp_path / "shards.jsonl").read_bytes().startswith(journal)
    assert (tmp_path / "shards.jsonl").stat().st_ino == inode
    assert [line["shard"]["num_rows"] for line in whole_lines(tmp_path)] == [4, 4, 4]
    writer.suspend()


def test_torn_last_line_does_not_count(store: Path) -> None:
    """Half a line is what a crash left: readers leave it out, and the next shard's line takes its place."""
    StoreWriter(store.with_name("other"), teacher_manifest(), rows_per_shard=4).suspend()
    other = store.with_name("other")
    with StoreWriter(other, teacher_manifest(), rows_per_shard=4) as writer:
        writer.append(teacher_rows()[:8])
        writer.suspend()
    with (other / "shards.jsonl").open("ab") as file:
        file.write(b'{"shard": {"file": "shard-00002.par')
    assert len(StoreReader(other, require_complete=False)) == 8
    finish(other)
    assert (other / "shards.jsonl").read_bytes().count(b"\n") == 5
    assert b"par{" not in (other / "shards.jsonl").read_bytes()


def test_damaged_line_is_named_and_mended(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit in the middle of the journal is refused by its line; a repair has that shard's rows made again."""
    lines = (store / "shards.jsonl").read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[2])
    damaged[len(damaged) // 2] ^= 1
    (store / "shards.jsonl").write_bytes(b"".join([*lines[:2], damaged, *lines[3:]]))
    for opened in (StoreReader, lambda path: StoreWriter(path, teacher_manifest())):
        with pytest.raises(StoreError, match=r"shards\.jsonl, line 3: damaged.*--repair"):
            opened(store)
    repair = take_out_damaged(store)
    assert (repair.damaged, repair.unlisted) == ((), ("shard-00002.parquet",))
    reader = StoreReader(store, require_complete=False)
    assert (len(reader), reader.complete) == (16, False)
    finish(store)
    assert inspect_main([str(store), "--verify"]) == 0
    assert "complete, verified" in capsys.readouterr().out


def test_cut_journal_is_refused_and_mended(store: Path) -> None:
    """Whole lines that are gone are missed, since the manifest has their number."""
    lines = (store / "shards.jsonl").read_bytes().splitlines(keepends=True)
    (store / "shards.jsonl").write_bytes(b"".join(lines[:3]))
    for opened in (StoreReader, lambda path: StoreWriter(path, teacher_manifest())):
        with pytest.raises(StoreError, match=r"shards\.jsonl: 3 shards, expected 5.*--repair"):
            opened(store)
    (store / "shards.jsonl").unlink()
    with pytest.raises(StoreError, match=r"shards\.jsonl: 0 shards, expected 5"):
        StoreReader(store)
    (store / "shards.jsonl").write_bytes(b"".join(lines[:3]))
    assert take_out_damaged(store).unlisted == ("shard-00003.parquet", "shard-00004.parquet")
    finish(store)


def test_line_that_could_not_be_written_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle of a line leaves a writer that can go on, and a journal without the half."""
    written = os.write

    def half_then_full(descriptor: int, content: bytes) -> int:
        written(descriptor, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    writer = StoreWriter(tmp_path, teacher_manifest(), rows_per_shard=4)
    writer.append(teacher_rows()[:4])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_then_full)
        with pytest.raises(StoreError, match=r"shards\.jsonl: could not be written.*No space"):
            writer.append(teacher_rows()[4:8])
    assert not (tmp_path / "shards.jsonl").read_bytes().endswith(b"\n")
    writer.append(teacher_rows())
    writer.close()
    finish(tmp_path)


def to_version_1(store: Path) -> None:
    """Write the lists of a store as version 0.1.0 did: in the manifest."""
    content = json.loads((store / "manifest.json").read_text(encoding="utf-8"))
    for key in ("checksum", "sealed_shards", "rewritten"):
        del content[key]
    for key in ("online", "total_rows"):
        del content["manifest"][key]
    content |= {"format_version": 1, "shards": [line["shard"] for line in whole_lines(store)]}
    content["checksum"] = fingerprint_json(content)
    (store / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    (store / "shards.jsonl").unlink()


def test_store_of_format_version_1_is_read(store: Path) -> None:
    """Stores whose manifest lists the shards are read as they are; a writer or a repair gives them a journal."""
    to_version_1(store)
    reader = StoreReader(store)
    assert reader.complete
    assert reader.refresh() == 0
    for found, expected in zip(reader.rollouts(range(20)), teacher_rows(), strict=True):
        assert_same_rollout(found, expected)
    assert not (store / "shards.jsonl").exists()
    shards = {path.name: path.read_bytes() for path in store.glob("*.parquet")}
    with StoreWriter(store, teacher_manifest()) as writer:
        assert writer.complete
        assert len(writer.completed_row_ids()) == 20
    assert len(whole_lines(store)) == 5
    finish(store)
    assert {path.name: path.read_bytes() for path in store.glob("*.parquet")} == shards


def test_store_of_format_version_1_is_mended(store: Path) -> None:
    """A damaged shard of such a store is taken out, and its rows are made again."""
    to_version_1(store)
    os.truncate(store / "shard-00002.parquet", 100)
    assert [entry.file for entry in take_out_damaged(store).damaged] == ["shard-00002.parquet"]
    assert len(StoreReader(store, require_complete=False)) == 16
    finish(store)
