"""Checkpoint folders on disk: sealed with checksums, found, verified, and removed. No tensors and no processes here.

OpenRLHF's layout: <ckpt.path>/_actor/<tag>/ with DeepSpeed's files, its `metric.json`, and `latest` beside the tags.
A checkpoint is written to `<tag>.partial`, sealed by `checksums.json`, and renamed: what has its own name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openrlhf_bd.errors import StoreError
from openrlhf_bd.store.files import write_text

CHECKSUMS = "checksums.json"
METRIC = "metric.json"
LATEST = "latest"
PARTIAL = ".partial"
BEST_PREFIX = "best"
_STUDENT = re.compile(r"global_step(\d+)_hf")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        path: its folder; the name is the tag.
        metric: its validation value, higher is better, or None.
        written_s: when it was sealed.
        size_bytes: size of its files.
    """

    path: Path
    metric: float | None
    written_s: float
    size_bytes: int


def checkpoint_files(folder: Path) -> list[str]:
    """Relative names of the files that checksums cover, sorted."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in (CHECKSUMS, METRIC))
    return sorted(file.relative_to(folder).as_posix() for file in files)


def settled_digest(path: Path) -> str:
    """SHA-256 of a file, once it is safely on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True))


def replace_folder(source: Path, target: Path) -> None:
    """Rename a finished folder over an older one of that name, if there is one."""
    if target.exists():
        shutil.rmtree(target)
    os.rename(source, target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Seal:
    """What makes a checkpoint whole.

    Attributes:
        files: SHA-256 of each file by relative name.
        num_ranks: ranks that wrote it.
        zero_stage: their ZeRO stage.
    """

    files: Mapping[str, str]
    num_ranks: int
    zero_stage: int


def seal_checkpoint(
    partial: Path, target: Path, seal: Seal, *, metric_value: float | None, metric_key: str | None
) -> None:
    """Make a written checkpoint whole: its seal, metric and name, and `latest`.

    Args:
        partial: folder that all ranks have written.
        target: the folder's final name.
        seal: what is in it.
        metric_value: validation value, higher is better, or None.
        metric_key: its name.
    """
    write_json(partial / METRIC, {"metric_key": metric_key, "metric_value": metric_value})
    write_json(
        partial / CHECKSUMS,
        {"files": dict(seal.files), "num_ranks": seal.num_ranks, "zero_stage": seal.zero_stage},
    )
    replace_folder(partial, target)
    temporary = target.with_name(LATEST + ".tmp")
    temporary.write_text(target.name, encoding="utf-8")
    os.replace(temporary, target.with_name(LATEST))


def read_seal(folder: Path) -> Seal:
    """The seal of a checkpoint; its files are all there, their content is not looked at.

    Raises:
        StoreError: the folder is missing or was never sealed, or a file of it is missing or was added.
    """
    if not folder.is_dir():
        present = ", ".join(checkpoint.path.name for checkpoint in checkpoints(folder.parent)) or "none"
        raise StoreError(f"{folder}: there is no such checkpoint; whole checkpoints beside it: {present}")
    path = folder / CHECKSUMS
    if not path.is_file():
        raise StoreError(f"{folder}: {CHECKSUMS} is missing, so the checkpoint is not whole; remove it to use another")
    try:
        seal = Seal(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path}: damaged ({error}); remove {folder} to resume from an older checkpoint") from error
    different = sorted(set(seal.files) ^ set(checkpoint_files(folder)))
    if different:
        raise StoreError(
            f"{folder}: files are missing or were added: {', '.join(different[:3])}; remove the folder to resume from "
            "an older checkpoint"
        )
    return seal


def damaged_files(folder: Path, seal: Seal, names: Sequence[str]) -> list[str]:
    """Those of the named files whose content is not what was written."""
    return [name for name in names if settled_digest(folder / name) != seal.files[name]]


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    sealed = [entry for entry in folder.iterdir() if not entry.name.endswith(PARTIAL) and (entry / CHECKSUMS).is_file()]
    return sorted((_describe(entry) for entry in sealed), key=lambda checkpoint: checkpoint.written_s)


def _describe(folder: Path) -> Checkpoint:
    metric_file = folder / METRIC
    metric = json.loads(metric_file.read_text(encoding="utf-8"))["metric_value"] if metric_file.is_file() else None
    return Checkpoint(
        path=folder,
        metric=metric,
        written_s=(folder / CHECKSUMS).stat().st_mtime,
        size_bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    )


def newest_tag(folder: Path) -> str | None:
    """Tag of the newest whole checkpoint, or None."""
    found = checkpoints(folder)
    return found[-1].path.name if found else None


def remove_old_students(folder: Path, *, newest: str, max_num: int) -> list[str]:
    """Remove the students (--ckpt.save_hf) of the first checkpoints over a limit. The newest stays.

    Args:
        folder: that they lie in, as `global_step<N>_hf`; others, such as selected students, are left alone.
        newest: name of the one that was just written.
        max_num: students kept.

    Returns:
        Names that were removed, oldest step first.
    """
    found = {int(match[1]): entry for entry in folder.iterdir() if (match := _STUDENT.fullmatch(entry.name))}
    old = [found[step] for step in sorted(found) if found[step].name != newest]
    removed = old[: max(0, len(found) - max_num)]
    for entry in removed:
        shutil.rmtree(entry)
    return [entry.name for entry in removed]


def remove_old(folder: Path, *, newest: str, max_num: int, max_gigabytes: float) -> list[str]:
    """Remove checkpoints over the limits, in OpenRLHF's order: without a metric first, then the worst, then the oldest.

    The newest checkpoint and those named best* stay.

    Args:
        folder: folder of the checkpoints.
        newest: tag of the checkpoint that was just sealed.
        max_num: checkpoints kept, best* not counted.
        max_gigabytes: size of all checkpoints kept.

    Returns:
        Tags that were removed.
    """
    found = checkpoints(folder)
    regular = [checkpoint for checkpoint in found if not checkpoint.path.name.startswith(BEST_PREFIX)]
    removable = sorted(
        (checkpoint for checkpoint in regular if checkpoint.path.name != newest),
        key=lambda checkpoint: (checkpoint.metric is not None, checkpoint.metric or 0.0, checkpoint.written_s),
    )
    count, size = len(regular), sum(checkpoint.size_bytes for checkpoint in found)
    removed = []
    for checkpoint in removable:
        if count <= max_num and size <= max_gigabytes * 1024**3:
            break
        shutil.rmtree(checkpoint.path)
        removed.append(checkpoint.path.name)
        count, size = count - 1, size - checkpoint.size_bytes
    return removed
