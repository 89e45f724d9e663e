"""A store behind a URL of fsspec: in memory, and in files that other processes reach through requests alone."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from openrlhf_bd.cli.inspect_store import main as inspect_main
from openrlhf_bd.cli.main import main
from openrlhf_bd.errors import RunFolderError, StoreError
from openrlhf_bd.store import StoreReader, StoreWriter, verify_store
from openrlhf_bd.store.folder import is_url, open_folder
from openrlhf_bd.store.repair import take_out_damaged
from tests.unit.store.deaths import die_everywhere
from tests.unit.store.rows import assert_same_rollout, teacher_manifest, teacher_rows


@pytest.fixture(params=["memory", "files"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a folder that is not there yet."""
    name = f"memory://{uuid.uuid4().hex}/store" if request.param == "memory" else f"dir::file://{tmp_path}/store"
    yield name
    if request.param == "memory":
        fsspec.filesystem("memory").rm(name.rsplit("/", 1)[0], recursive=True)


def names(url: str) -> list[str]:
    return sorted(open_folder(url).sizes())


def write(url: str) -> None:
    with StoreWriter(url, teacher_manifest(), rows_per_shard=6) as writer:
        writer.append(teacher_rows())


def test_rows_come_back(url: str) -> None:
    """Written, opened, read at random, verified and summed up by URL; one journal is left, and no lock."""
    write(url)
    assert names(url) == ["manifest.json", *[f"shard-{n:05d}.parquet" for n in range(4)], "shards.jsonl"]
    reader = StoreReader(url)
    assert reader.path == url
    for found, expected in zip(reader.rollouts(range(20)), teacher_rows(), strict=True):
        assert_same_rollout(found, expected)
    verify_store(reader.path)
    assert inspect_main([url, "--verify"]) == 0


def test_local_urls_are_local_folders(tmp_path: Path) -> None:
    """file:// keeps the guarantees of a local folder: it is the same thing."""
    write(f"file://{tmp_path}/store")
    assert StoreReader(tmp_path / "store").complete
    assert (tmp_path / "store" / ".lock").exists()
    assert not is_url(f"file://{tmp_path}")
    assert not is_url("data/store")


def test_interrupted_store_goes_on(url: str) -> None:
    """Rows sealed before an exception are kept; what is appended later is read by an open reader."""
    writer = StoreWriter(url, teacher_manifest(), rows_per_shard=6)
    writer.append(teacher_rows()[:6])
    reader = StoreReader(url, require_complete=False)
    writer.append(teacher_rows()[6:18])
    assert reader.refresh() == 12
    # Additions to the journal, each a file of its own until the writer closes.
    assert len([name for name in names(url) if name.startswith("shards.jsonl.")]) == 3
    writer.suspend()
    assert "shards.jsonl" in names(url)
    assert not [name for name in names(url) if name.startswith("shards.jsonl.")]
    assert reader.refresh() == 0
    with StoreWriter(url, teacher_manifest(), rows_per_shard=6) as writer:
        assert writer.append(teacher_rows()) == 2
    assert reader.refresh() == 2
    assert len(StoreReader(url)) == 20


def test_second_writer_is_refused(url: str) -> None:
    """While a writer lives no other one gets in; the message says what to remove where it is dead elsewhere."""
    writer = StoreWriter(url, teacher_manifest())
    with pytest.raises(RunFolderError, match=rf"process {os.getpid()} on .* is writing.*remove .*/\.lock"):
        StoreWriter(url, teacher_manifest())
    assert open_folder(url).lock_holder().startswith(f"{os.getpid()} on ")
    writer.suspend()
    assert open_folder(url).lock_holder() is None
    StoreWriter(url, teacher_manifest()).suspend()


def test_writer_of_another_machine_is_not_pushed_aside(url: str) -> None:
    """Whether a process elsewhere lives cannot be seen from here, so its lock stands until somebody removes it."""
    StoreWriter(url, teacher_manifest()).suspend()
    folder = open_folder(url)
    folder.replace(".lock", b'{"pid": 1, "host": "elsewhere", "node": 7}')
    with pytest.raises(RunFolderError, match="process 1 on elsewhere is writing"):
        StoreWriter(url, teacher_manifest())
    folder.remove(".lock")
    StoreWriter(url, teacher_manifest()).suspend()


def test_damage_is_found_and_mended(url: str) -> None:
    """A cut shard is refused by name, a repair takes it out, and its rows are made again."""
    write(url)
    folder = open_folder(url)
    folder.replace("shard-00001.parquet", folder.read("shard-00001.parquet")[:-10])
    with pytest.raises(StoreError, match=r"shard-00001\.parquet: [0-9]+ bytes, expected"):
        StoreReader(url)
    assert take_out_damaged(url).num_rows == 6
    assert folder.size_bytes("damaged/shard-00001.parquet.0") is not None
    write(url)
    reader = StoreReader(url)
    verify_store(reader.path)
    for found, expected in zip(reader.rollouts(range(20)), teacher_rows(), strict=True):
        assert_same_rollout(found, expected)


def test_export_and_import(url: str, tmp_path: Path) -> None:
    """A store behind a URL becomes a data set, and a data set such a store."""
    write(url)
    assert main(["export", url, str(tmp_path / "data")]) == 0
    assert main(["import", str(tmp_path / "data"), f"{url}_again"]) == 0
    assert StoreReader(f"{url}_again").row_ids == StoreReader(url).row_ids


def test_killed_writer_is_resumed(tmp_path: Path) -> None:
    """A writer that dies before any of its requests is continued from the same machine, its lock taken over."""
    num_done = set()
    for folder in die_everywhere(tmp_path, "upload"):
        url = f"dir::file://{folder}"
        with StoreWriter(url, teacher_manifest(), rows_per_shard=6) as writer:
            num_done.add(len(writer.completed_row_ids()))
            writer.quarantine("train:9:1", "it died")
            writer.append(teacher_rows()[:-1])
        reader = StoreReader(url)
        verify_store(reader.path)
        for found, expected in zip(reader.rollouts(range(19)), teacher_rows()[:-1], strict=True):
            assert_same_rollout(found, expected)
        assert names(url) == ["manifest.json", *[f"shard-{n:05d}.parquet" for n in range(4)], "shards.jsonl"]
    assert num_done == {0, 6, 12, 18, 19}


def test_another_process_reads(tmp_path: Path) -> None:
    """A process that has nothing but the URL opens the store."""
    url = f"dir::file://{tmp_path}/store"
    write(url)
    code = f"from openrlhf_bd.store import StoreReader; print(StoreReader({url!r}).rollouts([7])[0].row_id)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "train:3:1"


def test_unknown_protocol_is_refused(tmp_path: Path) -> None:
    """A URL that no package can reach says so before anything is made."""
    with pytest.raises(StoreError, match="nosuch://bucket/store: cannot be reached"):
        StoreWriter("nosuch://bucket/store", teacher_manifest())
