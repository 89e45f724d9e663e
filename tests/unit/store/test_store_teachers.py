"""Stores whose teacher saw other prompts than the student, and stores of several teachers."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from openrlhf_bd.cli.inspect_store import main as inspect_main
from openrlhf_bd.cli.main import main
from openrlhf_bd.records import Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter, summary
from openrlhf_bd.store.shards import prompt_hash
from tests.unit.store.rows import assert_same_rollout, teacher_manifest, teacher_row, teacher_rows

# The largest hash, beyond 63 bits, and a small one.
HASHES = (2**64 - 1, 5)


def manifest_of(**fingerprints: str) -> StoreManifest:
    return teacher_manifest(
        num_prompts=2,
        n_samples_per_prompt=1,
        fingerprints={key.replace("__", ":"): v for key, v in fingerprints.items()},
    )


def rows() -> list[Rollout]:
    return [
        replace(teacher_row(number), teacher_prompt_hash=HASHES[number], teacher=name)
        for number, name in enumerate(("sums", "default"))
    ]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    manifest = manifest_of(tokenizer="a", teacher__default="b", teacher__sums="c", teacher_prompts="d")
    with StoreWriter(tmp_path / "store", manifest) as writer:
        writer.append(rows())
    return tmp_path / "store"


def test_hash_of_a_prompt() -> None:
    """BLAKE2b with 8 bytes of the length as 8 bytes and the ids as 4 bytes each, little-endian."""
    expected = hashlib.blake2b(bytes([2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 1, 0, 0]), digest_size=8).digest()
    assert prompt_hash(np.array([7, 257], np.int32)) == int.from_bytes(expected, "little")


def test_columns_are_there_where_the_manifest_says_so(store: Path, tmp_path: Path) -> None:
    """Both columns come back as they were written; a store of one teacher and one prompt has neither."""
    columns = pq.read_schema(store / "shard-00000.parquet").names
    assert {"teacher_prompt_hash", "teacher"} <= set(columns)
    for row, again in zip(rows(), StoreReader(store).rollouts(range(2)), strict=True):
        assert (again.teacher_prompt_hash, again.teacher) == (row.teacher_prompt_hash, row.teacher)
        assert_same_rollout(again, row)

    with StoreWriter(tmp_path / "plain", teacher_manifest()) as writer:
        writer.append(teacher_rows())
    assert not {"teacher_prompt_hash", "teacher"} & set(pq.read_schema(tmp_path / "plain/shard-00000.parquet").names)
    assert StoreReader(tmp_path / "plain").rollouts([0])[0].teacher is None


def test_both_survive_export_and_import(store: Path, tmp_path: Path) -> None:
    """Hashes beyond 63 bits and names come back from a Hugging Face data set."""
    assert main(["export", str(store), str(tmp_path / "data")]) == 0
    assert main(["import", str(tmp_path / "data"), str(tmp_path / "again")]) == 0
    again = StoreReader(tmp_path / "again")
    assert again.manifest.teachers == ("default", "sums")
    found = [(row.teacher_prompt_hash, row.teacher) for row in again.rollouts(range(2))]
    assert found == [(HASHES[0], "sums"), (HASHES[1], "default")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_prompt_hash": None}, "found no hash of a teacher's prompt"),
        ({"teacher": None}, "found teacher None, expected one of"),
        ({"teacher": "math"}, "found teacher 'math', expected one of"),
    ],
)
def test_rows_that_are_not_what_the_manifest_says(tmp_path: Path, changes: dict[str, str | None], message: str) -> None:
    """A row without its hash, or of a teacher that the store does not have, is refused by name."""
    manifest = manifest_of(teacher__default="b", teacher__sums="c", teacher_prompts="d")
    with (
        pytest.raises(ValueError, match=f"row 'train:0:0': {message}"),
        StoreWriter(tmp_path / "store", manifest) as writer,
    ):
        writer.append([replace(rows()[0], **changes)])


def test_plain_stores_take_neither(tmp_path: Path) -> None:
    """A hash or a name for which a store has no column is refused, not lost."""
    with (
        pytest.raises(ValueError, match=r"found hash of a teacher's prompt, unlike the manifest"),
        StoreWriter(tmp_path / "a", manifest_of(teacher="b")) as writer,
    ):
        writer.append([replace(rows()[0], teacher=None)])
    with (
        pytest.raises(ValueError, match="found teacher 'sums', expected one of a store without names"),
        StoreWriter(tmp_path / "b", manifest_of(teacher="b")) as writer,
    ):
        writer.append([replace(rows()[0], teacher_prompt_hash=None)])


def test_rows_are_counted_by_teacher(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`inspect` shows how many rows each teacher made, and the fingerprints of all."""
    monkeypatch.setenv("COLUMNS", "200")
    assert summary(StoreReader(store)).rows_by_teacher == {"default": 1, "sums": 1}
    assert inspect_main([str(store), "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "rows of teacher default",
        "fingerprint teacher:sums",
        "fingerprint teacher_prompts",
        "by teacher sums",
    ):
        assert part in shown
