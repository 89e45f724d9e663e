"""Checkpoint folders: what is whole, what is kept, what is noticed."""

import os
from pathlib import Path

import pytest

from openrlhf_bd.errors import StoreError
from openrlhf_bd.student.checkpoints import (
    CHECKSUMS,
    LATEST,
    PARTIAL,
    Seal,
    checkpoint_files,
    checkpoints,
    damaged_files,
    newest_tag,
    read_seal,
    remove_old,
    remove_old_students,
    seal_checkpoint,
    settled_digest,
)


def write(folder: Path, step: int, *, tag: str | None = None, metric: float | None = None, size: int = 10) -> Path:
    """A sealed checkpoint of two files, older ones first by their time."""
    target = folder / (tag or f"global_step{step}")
    partial = target.with_name(target.name + PARTIAL)
    (partial / "zero").mkdir(parents=True)
    (partial / "model.pt").write_bytes(bytes(size))
    (partial / "zero" / "rank0.pt").write_bytes(b"state")
    files = {name: settled_digest(partial / name) for name in checkpoint_files(partial)}
    seal_checkpoint(partial, target, Seal(files, 2, 3), metric_value=metric, metric_key=None)
    os.utime(target / CHECKSUMS, (step, step))
    return target


def tags(folder: Path) -> list[str]:
    return [checkpoint.path.name for checkpoint in checkpoints(folder)]


def test_sealed_checkpoint_is_found_and_read(tmp_path: Path) -> None:
    """A sealed checkpoint is listed, names its files and writers, and `latest` points at it."""
    target = write(tmp_path, 7, metric=1.5)
    seal = read_seal(target)
    assert (sorted(seal.files), seal.num_ranks, seal.zero_stage) == (["model.pt", "zero/rank0.pt"], 2, 3)
    assert damaged_files(target, seal, sorted(seal.files)) == []
    assert (tmp_path / LATEST).read_text(encoding="utf-8") == "global_step7"
    assert [checkpoint.metric for checkpoint in checkpoints(tmp_path)] == [1.5]


def test_interrupted_checkpoint_is_never_the_newest(tmp_path: Path) -> None:
    """A folder that was being written when the job died is not a checkpoint; the one before it is the newest."""
    write(tmp_path, 1)
    (tmp_path / f"global_step2{PARTIAL}").mkdir()
    (tmp_path / "global_step3").mkdir()
    assert newest_tag(tmp_path) == "global_step1"
    assert newest_tag(tmp_path / "nothing") is None


def test_missing_checkpoint_lists_those_there(tmp_path: Path) -> None:
    """A tag that is not there is an error that lists the whole ones."""
    write(tmp_path, 1)
    with pytest.raises(StoreError, match="whole checkpoints beside it: global_step1"):
        read_seal(tmp_path / "global_step9")


def test_unsealed_missing_and_added_files_are_noticed(tmp_path: Path) -> None:
    """A folder without a seal, with a file too few or a file too many is an error."""
    target = write(tmp_path, 1)
    (target / "model.pt").rename(target / "other.pt")
    with pytest.raises(StoreError, match=r"model\.pt, other\.pt"):
        read_seal(target)
    (target / CHECKSUMS).unlink()
    with pytest.raises(StoreError, match="not whole"):
        read_seal(target)


def test_changed_byte_is_noticed(tmp_path: Path) -> None:
    """A file whose content changed is named."""
    target = write(tmp_path, 1)
    (target / "zero" / "rank0.pt").write_bytes(b"stata")
    seal = read_seal(target)
    assert damaged_files(target, seal, sorted(seal.files)) == ["zero/rank0.pt"]


def test_same_tag_replaces(tmp_path: Path) -> None:
    """Writing a tag again replaces the old folder."""
    write(tmp_path, 1, size=10)
    write(tmp_path, 1, size=20)
    assert (tmp_path / "global_step1" / "model.pt").stat().st_size == 20


class TestRemoval:
    def test_oldest_go_first(self, tmp_path: Path) -> None:
        """Without metrics the oldest go."""
        for step in (1, 2, 3, 4):
            write(tmp_path, step)
        removed = remove_old(tmp_path, newest="global_step4", max_num=2, max_gigabytes=1)
        assert (removed, tags(tmp_path)) == (["global_step1", "global_step2"], ["global_step3", "global_step4"])

    def test_worst_go_before_better(self, tmp_path: Path) -> None:
        """With metrics those without one go first, then the worst; a metric of 0 is a metric."""
        for step, metric in ((1, 0.9), (2, None), (3, 0.0), (4, 0.5)):
            write(tmp_path, step, metric=metric)
        assert remove_old(tmp_path, newest="global_step4", max_num=2, max_gigabytes=1) == [
            "global_step2",
            "global_step3",
        ]

    def test_newest_and_best_stay(self, tmp_path: Path) -> None:
        """The newest checkpoint stays even if it is the worst and too large; best* is not counted and stays."""
        write(tmp_path, 1, tag="best_global_step1")
        write(tmp_path, 2, metric=0.9)
        write(tmp_path, 3, metric=0.1)
        assert remove_old(tmp_path, newest="global_step3", max_num=2, max_gigabytes=1) == []
        assert remove_old(tmp_path, newest="global_step3", max_num=1, max_gigabytes=1) == ["global_step2"]
        assert remove_old(tmp_path, newest="global_step3", max_num=1, max_gigabytes=1e-12) == []
        assert tags(tmp_path) == ["best_global_step1", "global_step3"]


def test_students_over_the_limit_go_by_step(tmp_path: Path) -> None:
    """Of `global_step<N>_hf` folders the newest steps stay; selected students and checkpoints are left alone."""
    for name in ("global_step9_hf", "global_step10_hf", "global_step11_hf", "best_global_step2_hf", "_actor"):
        (tmp_path / name).mkdir()
    assert remove_old_students(tmp_path, newest="global_step11_hf", max_num=2) == ["global_step9_hf"]
    left = sorted(entry.name for entry in tmp_path.iterdir())
    assert left == ["_actor", "best_global_step2_hf", "global_step10_hf", "global_step11_hf"]
    # After a resume the newest may have a lower step than one of before; it stays.
    assert remove_old_students(tmp_path, newest="global_step10_hf", max_num=1) == ["global_step11_hf"]
