"""A store survives crashes, repetition and rivals."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from openrlhf_bd.errors import RunFolderError, StoreError
from openrlhf_bd.records import Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter, verify_store
from openrlhf_bd.store.repair import take_out_damaged
from tests.unit.store.deaths import die_everywhere, whole_lines
from tests.unit.store.rows import (
    assert_same_rollout,
    gold_row,
    recorded_sets,
    teacher_manifest,
    teacher_row,
    teacher_rows,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_killed_writer_is_resumed(tmp_path: Path) -> None:
    """A writer that dies between any two operations on files, or in the middle of one, is continued: no row is lost."""
    expected, seen = teacher_rows()[:-1], set()
    for folder in die_everywhere(tmp_path, "write"):
        listed = [line["shard"]["file"] for line in whole_lines(folder)]
        sealed = {name: (folder / name).read_bytes() for name in listed}
        num_sealed = sum(line["shard"]["num_rows"] for line in whole_lines(folder))
        if (folder / "manifest.json").exists():
            assert len(StoreReader(folder, require_complete=False)) == num_sealed
        with StoreWriter(folder, teacher_manifest(), rows_per_shard=6) as writer:
            assert len(writer.completed_row_ids()) == num_sealed
            assert not [name for name in names(folder) if name.endswith(".tmp")]
            writer.quarantine("train:9:1", "it died")
            assert writer.append(expected) == 19 - num_sealed
        reader = StoreReader(folder)
        assert [row.row_id for row in reader.quarantined] == ["train:9:1"]
        for found, row in zip(reader.rollouts(range(19)), expected, strict=True):
            assert_same_rollout(found, row)
        verify_store(reader.path)
        assert names(folder) == [
            ".lock",
            "manifest.json",
            *[f"shard-{n:05d}.parquet" for n in range(4)],
            "shards.jsonl",
        ]
        assert {name: (folder / name).read_bytes() for name in listed} == sealed
        seen.add(num_sealed)
    # Deaths at every stage: without a shard, with one, two, three, and with all four.
    assert seen == {0, 6, 12, 18, 19}


def test_killed_repair_is_repeated(tmp_path: Path) -> None:
    """A repair that dies anywhere is mended by the next one: exactly the rows of the damaged shard are made again."""
    whole = tmp_path / "whole"
    with StoreWriter(whole, teacher_manifest(), rows_per_shard=5) as writer:
        writer.append(teacher_rows())
    (whole / "shard-00002.parquet").write_bytes(b"damaged")
    for number in range(1, 40):
        shutil.copytree(whole, tmp_path / "repairs" / str(number))
    folders = die_everywhere(tmp_path / "repairs", "repair")
    assert len(folders) == 39
    for folder in folders:
        take_out_damaged(folder)
        assert sorted(path.read_bytes() for path in (folder / "damaged").iterdir()) == [b"damaged"]
        with StoreWriter(folder, teacher_manifest(), rows_per_shard=5) as writer:
            assert len(writer.completed_row_ids()) == 15
            assert writer.append(teacher_rows()) == 5
        verify_store(folder)


def test_left_over_temporaries_are_removed(tmp_path: Path) -> None:
    """Half-written files of a dead writer are no rows, and the next writer removes them."""
    StoreWriter(tmp_path, teacher_manifest(), 4).suspend()
    for name in ("shard-00000.parquet.tmp", "manifest.json.tmp"):
        (tmp_path / name).write_bytes(b"half a fi")
    assert len(StoreReader(tmp_path, require_complete=False)) == 0
    StoreWriter(tmp_path, teacher_manifest(), 4).suspend()
    assert names(tmp_path) == [".lock", "manifest.json"]


def test_crash_before_the_first_manifest(tmp_path: Path) -> None:
    """A folder that holds only a dead writer's first steps is taken as new."""
    (tmp_path / "manifest.json.tmp").write_text("{", encoding="utf-8")
    (tmp_path / ".lock").touch()
    with StoreWriter(tmp_path, teacher_manifest()) as writer:
        writer.append(teacher_rows())
    assert len(StoreReader(tmp_path)) == 20


def test_appending_twice_changes_nothing(tmp_path: Path) -> None:
    """A row that is buffered or sealed already is dropped, within one call, between calls and between writers."""
    first, again = teacher_row(0), teacher_row(0, num_tokens=2)
    writer = StoreWriter(tmp_path, teacher_manifest(num_prompts=2, n_samples_per_prompt=1), 4)
    assert writer.append([first, again]) == 1
    assert writer.append([again]) == 0
    writer.flush()
    assert writer.append([again]) == 0
    writer.suspend()
    with StoreWriter(tmp_path, teacher_manifest(num_prompts=2, n_samples_per_prompt=1), 4) as writer:
        assert writer.append([again, teacher_row(1)]) == 1
    assert_same_rollout(StoreReader(tmp_path).rollouts([0])[0], first)


def test_completed_rows_are_the_sealed_ones(tmp_path: Path) -> None:
    """Only rows that would survive a crash are reported as completed; `flush` makes the buffered ones so."""
    with StoreWriter(tmp_path, teacher_manifest(num_prompts=3, n_samples_per_prompt=1), 2) as writer:
        writer.append([teacher_row(0), teacher_row(1), teacher_row(2)])
        assert writer.completed_row_ids() == {"train:0:0", "train:1:0"}
        writer.flush()
        assert writer.completed_row_ids() == {"train:0:0", "train:1:0", "train:2:0"}
        writer.flush()
    assert [name for name in names(tmp_path) if name.endswith("parquet")] == [
        "shard-00000.parquet",
        "shard-00001.parquet",
    ]


def test_exception_leaves_the_store_unfinished(tmp_path: Path) -> None:
    """An exception that leaves the block keeps the rows so far, and does not mark the store complete."""

    def produce() -> None:
        with StoreWriter(tmp_path, teacher_manifest()) as writer:
            writer.append(teacher_rows()[:3])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        produce()
    with pytest.raises(StoreError, match="unfinished: 3 of 20"):
        StoreReader(tmp_path)
    with StoreWriter(tmp_path, teacher_manifest()) as writer:
        assert len(writer.completed_row_ids()) == 3
        writer.append(teacher_rows())
    assert StoreReader(tmp_path).complete


def test_missing_rows_do_not_make_a_complete_store(tmp_path: Path) -> None:
    """Closing with fewer rows than promised is an error that says how many; the rows are kept."""
    writer = StoreWriter(tmp_path, teacher_manifest())
    writer.append(teacher_rows()[:19])
    with pytest.raises(StoreError, match=r"19 rows, expected 20 \(10 prompts with 2 responses each\)"):
        writer.close()
    assert len(StoreReader(tmp_path, require_complete=False)) == 19


def test_complete_store_takes_no_new_rows(tmp_path: Path) -> None:
    """A complete store can be opened again and repeated, but not added to."""
    with StoreWriter(tmp_path, teacher_manifest()) as writer:
        writer.append(teacher_rows())
    with StoreWriter(tmp_path, teacher_manifest()) as writer:
        assert writer.complete
        assert writer.append(teacher_rows()) == 0
        with pytest.raises(StoreError, match="row 'train:77:0' is new, but the store is complete with 20 rows"):
            writer.append([teacher_row(77)])
    assert len(StoreReader(tmp_path)) == 20


def test_other_manifest_is_refused_key_by_key(tmp_path: Path) -> None:
    """A store made otherwise is refused; the message lists each differing key, both values, and what to do."""
    StoreWriter(tmp_path, teacher_manifest()).suspend()
    before = (tmp_path / "manifest.json").read_bytes()
    other = teacher_manifest(top_p=0.95, fingerprints={"tokenizer": "a1", "teacher": "c3"}, sampling={"seed": 42})
    with pytest.raises(RunFolderError) as caught:
        StoreWriter(tmp_path, other)
    message = str(caught.value)
    assert "fingerprints.teacher: found 'b2', expected 'c3'" in message
    assert "sampling.temperature: found 1.0, expected None" in message
    assert "top_p: found 0.8, expected 0.95" in message
    assert "tokenizer" not in message
    assert "Name another path" in message
    assert (tmp_path / "manifest.json").read_bytes() == before
    # The refused writer holds no lock.
    StoreWriter(tmp_path, teacher_manifest()).suspend()


def test_versions_are_no_identity(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another version of the software continues a store, with a warning."""
    StoreWriter(tmp_path, teacher_manifest(versions={"vllm": "1"}, created="then")).suspend()
    with caplog.at_level(logging.WARNING):
        StoreWriter(tmp_path, teacher_manifest(versions={"vllm": "2"}, created="now")).suspend()
    assert "'vllm': '1'" in caplog.text


def test_second_writer_is_refused(tmp_path: Path) -> None:
    """Two writers never share a folder: the second is told which process holds it, and may come later."""
    first = StoreWriter(tmp_path, teacher_manifest())
    with pytest.raises(RunFolderError, match=f"process {os.getpid()} on .* is writing to this store"):
        StoreWriter(tmp_path, teacher_manifest())
    first.suspend()
    StoreWriter(tmp_path, teacher_manifest()).suspend()


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    """A folder with other files, or a file, is not written to."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match=r"thesis\.tex"):
        StoreWriter(tmp_path, teacher_manifest())
    assert names(tmp_path) == ["thesis.tex"]
    with pytest.raises(RunFolderError, match="found a file, expected a folder"):
        StoreWriter(tmp_path / "thesis.tex", teacher_manifest())
    with pytest.raises(StoreError, match="can't be written"):
        StoreWriter(tmp_path / "thesis.tex" / "store", teacher_manifest())


def test_full_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk gives one error that names the file; rows sealed before and after it are kept."""

    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    writer = StoreWriter(tmp_path, teacher_manifest(), 4)
    writer.append(teacher_rows()[:4])
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with (
            pytest.raises(StoreError, match=r"shard-00001\.parquet: could not be written.*No space.*make room"),
            writer,
        ):
            writer.append(teacher_rows()[:8])
    with StoreWriter(tmp_path, teacher_manifest(), 4) as writer:
        assert len(writer.completed_row_ids()) == 4
        writer.append(teacher_rows())
    assert len(StoreReader(tmp_path)) == 20


def bad_rows() -> list[tuple[Rollout, str]]:
    good = teacher_row(0)
    ids = good.response_ids
    return [
        (gold_row(0), "found no candidate sets"),
        (Rollout("x", ids, ids[:0], "stop", None, recorded_sets([1], 0)), "no response token"),
        (Rollout("x", ids, ids, "stop", None, recorded_sets([1] * 4, 0)), "4 candidate sets, expected 5 or 6"),
        (Rollout("x", ids, ids, "stop", None, recorded_sets([1] * 7, 0)), "7 candidate sets, expected 5 or 6"),
        (Rollout("x", ids, ids, "stop", np.zeros(4, np.float32), good.sets), "4 log-probabilities, expected 5"),
        (Rollout("x", ids, ids, "stop", np.full(5, np.nan, np.float32), good.sets), "expected 5 numbers"),
        (Rollout("x", ids, ids, "stop", None, recorded_sets([1] * 5, 0, has_logprobs=False)), "has_logprobs"),
    ]


@pytest.mark.parametrize(("row", "finding"), bad_rows())
def test_malformed_rows_are_refused(tmp_path: Path, row: Rollout, finding: str) -> None:
    """A row that does not fit the manifest or itself is refused by name, and its whole batch with it."""
    writer = StoreWriter(tmp_path, teacher_manifest())
    with pytest.raises(ValueError, match=f"row '{row.row_id}': found .*{finding}|{finding}"):
        writer.append([teacher_row(5), row])
    assert writer.append([teacher_row(5)]) == 1
    writer.suspend()
    with pytest.raises(ValueError, match="closed"):
        writer.append([])


def test_gold_store_refuses_teacher_rows(tmp_path: Path) -> None:
    """Teacher's log-probabilities and sets don't slip into a gold store."""
    writer = StoreWriter(tmp_path, StoreManifest(kind="gold", num_prompts=1))
    with pytest.raises(ValueError, match="expected none in a gold store"):
        writer.append([teacher_row(0)])
    writer.suspend()


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "gold", "top_p": 1.0},
        {"kind": "teacher", "has_logprobs": True},
        {"kind": "teacher", "always_include": (2,)},
        {"kind": "teacher", "top_p": 0.0},
        {"kind": "teacher", "no_such_key": 1},
    ],
)
def test_contradictory_manifests_are_refused(fields: dict[str, object]) -> None:
    """A manifest that contradicts itself can't be made."""
    with pytest.raises(ValueError, match="1 validation error"):
        StoreManifest.model_validate({"num_prompts": 1, **fields})


def test_quarantined_row_is_named_and_not_waited_for(tmp_path: Path) -> None:
    """A row that was given up is in the manifest with its reason; the store is complete without it, and resumable."""
    rows = teacher_rows()
    with StoreWriter(tmp_path / "store", teacher_manifest()) as writer:
        writer.quarantine("train:3:1", "it died")
        writer.append([row for row in rows if row.row_id not in ("train:3:1", "train:9:1")])
        writer.suspend()
    with StoreWriter(tmp_path / "store", teacher_manifest()) as writer:
        assert writer.quarantined_row_ids() == {"train:3:1"}
        writer.append([row for row in rows if row.row_id == "train:9:1"])
    reader = StoreReader(tmp_path / "store")
    assert len(reader) == 19
    assert "train:3:1" not in reader.row_ids
    assert [(row.row_id, row.reason) for row in reader.quarantined] == [("train:3:1", "it died")]


def test_sealed_row_cannot_be_quarantined(tmp_path: Path) -> None:
    """A row that is there stays there."""
    with StoreWriter(tmp_path / "store", teacher_manifest()) as writer:
        writer.append(teacher_rows())
        with pytest.raises(ValueError, match="'train:3:1' is there"):
            writer.quarantine("train:3:1", "it died")


def test_options_of_the_first_job_are_kept(tmp_path: Path) -> None:
    """What a repair repeats is the job that began the store, not one that only went on with it from another folder."""
    with StoreWriter(tmp_path, teacher_manifest(), 4) as writer:
        writer.keep_job("first")
        writer.append(teacher_rows()[:3])
        writer.suspend()
    with StoreWriter(tmp_path, teacher_manifest(), 4) as writer:
        writer.keep_job("second")
        writer.append(teacher_rows())
    assert (tmp_path / "job.yaml").read_text(encoding="utf-8") == "first"
