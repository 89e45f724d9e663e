"""The folder of one run: whose it is, who writes to it, and which stages are finished.

`run.json` holds the run's identity (the options that decide its results) and a record of each finished stage. The same
command on the same folder goes on where it stopped; any other command is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openrlhf_bd import __version__
from openrlhf_bd.config import Config
from openrlhf_bd.errors import RunFolderError
from openrlhf_bd.store.files import LOCK_FILE, lock_holder, temporary_name, write_text
from openrlhf_bd.store.manifest import flatten

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"

# Options that change how a run is carried out, not what comes out of it: they may differ when a run is resumed.
_NOT_IDENTITY = (
    "cluster.",
    "logger.",
    "vllm.",
    "ckpt.load_enable",
    "ckpt.max_",
    "ckpt.output_dir",
    "ckpt.path",
    "teacher.num_engines",
    "teacher.max_num_seqs",
    "teacher.max_engine_restarts",
    "teacher.max_quarantined_rows",
    "teacher.gpu_memory_utilization",
    "teacher.enforce_eager",
    "teacher.api_base",
    "teacher.api_concurrency",
    "teacher.api_timeout_s",
    "teacher.api_max_retries",
    "teacher.enable_prefix_caching",
    "eval.num_examples",
)


def run_identity(config: Config) -> dict[str, Any]:
    """The dotted options that decide a run's results, as JSON values."""
    flat = flatten(config.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if not key.startswith(_NOT_IDENTITY)}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1))


def _second_writer(path: Path, holder: str) -> RunFolderError:
    return RunFolderError(
        f"--ckpt.output_dir {path}: process {holder} is writing to this folder; wait for it, or name another folder"
    )


class RunFolder:
    """An open run folder. Use `RunFolder.open`; it holds the folder's lock while the block runs."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self._content = content

    @staticmethod
    def check(path: Path, identity: Mapping[str, Any]) -> None:
        """Refuse a folder that holds something else, without changing anything.

        Raises:
            RunFolderError: the folder holds another run, or files that are no run, or another process is writing to it.
        """
        run_file = path / RUN_FILE
        if not path.exists():
            return
        if not path.is_dir():
            raise RunFolderError(f"--ckpt.output_dir {path}: found a file, expected a folder; name another path")
        if not run_file.exists():
            # A run that was killed at its first step leaves no more than these.
            ours = {LOCK_FILE, temporary_name(run_file).name}
            if any(entry.name not in ours for entry in path.iterdir()):
                raise RunFolderError(
                    f"--ckpt.output_dir {path}: the folder holds files that are not a run of openrlhf_bd; "
                    "expected a new or empty folder, or this run's own. Name another path; nothing was changed"
                )
            return
        found = json.loads(run_file.read_text(encoding="utf-8"))["identity"]
        wanted = json.loads(json.dumps(identity))
        differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        if differing:
            lines = "\n".join(f"  {key}: there {found.get(key)!r}, now {wanted.get(key)!r}" for key in differing[:12])
            raise RunFolderError(
                f"--ckpt.output_dir {path}: the folder holds another run, which differs in {len(differing)} options:\n"
                f"{lines}\nName another folder, or repeat that run's command to resume it; nothing was changed"
            )
        if (holder := lock_holder(path)) is not None:
            raise _second_writer(path, holder)

    @staticmethod
    @contextmanager
    def open(path: Path, identity: Mapping[str, Any]) -> Iterator[RunFolder]:
        """Lock the folder for one writer and read or start its record.

        Raises:
            RunFolderError: another run's folder, or another process is writing to it.
        """
        RunFolder.check(path, identity)
        path.mkdir(parents=True, exist_ok=True)
        with (path / LOCK_FILE).open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise _second_writer(path, lock.read().strip() or "unknown") from None
            lock.seek(0)
            lock.truncate()
            lock.write(str(os.getpid()))
            lock.flush()
            run_file = path / RUN_FILE
            if run_file.exists():
                content = json.loads(run_file.read_text(encoding="utf-8"))
            else:
                content = {"version": __version__, "created": time.time(), "identity": dict(identity), "stages": {}}
                _write(run_file, content)
            yield RunFolder(path, content)

    @staticmethod
    def finished_stages(path: Path) -> frozenset[str]:
        """Names of the stages that the run in a folder has finished; none where there is no run."""
        run_file = path / RUN_FILE
        if not run_file.exists():
            return frozenset()
        return frozenset(json.loads(run_file.read_text(encoding="utf-8"))["stages"])

    @staticmethod
    def started_s(path: Path) -> float:
        """When the run in a folder began, in seconds of the epoch: what tells it from any other run."""
        return float(json.loads((path / RUN_FILE).read_text(encoding="utf-8"))["created"])

    def finished(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left on record, or None if it has not finished."""
        record = self._content["stages"].get(stage)
        return dict(record) if record is not None else None

    def finish(self, stage: str, **record: Any) -> None:
        """Mark a stage as finished, with what later stages and the report want to know of it."""
        self._content["stages"][stage] = record
        _write(self.path / RUN_FILE, self._content)
