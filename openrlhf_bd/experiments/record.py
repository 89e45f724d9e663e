"""`pipeline.json`: the experiments of an output folder, and what became of each stage; and the folder's lock."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openrlhf_bd import __version__
from openrlhf_bd.errors import RunFolderError
from openrlhf_bd.experiments.stages import Stage
from openrlhf_bd.store.files import FolderLock, lock_holder, write_text

RECORD_FILE = "pipeline.json"


class PipelineRecord:
    """The record of an output folder. Every change is written at once, in one step.

    `stages` has an entry for each stage's folder: kind, key, state, started, seconds, gpus. `experiments` has an entry
    for each experiment file: title, scale, mode, published, and its stages as the file shows them.
    """

    def __init__(self, output_dir: Path, content: dict[str, Any]) -> None:
        self.output_dir = output_dir
        self._content = content

    @staticmethod
    def check(output_dir: Path) -> None:
        """Refuse a folder that holds something else, without changing anything.

        Raises:
            RunFolderError: it holds files and no pipeline, or another process is writing to it.
        """
        if not output_dir.exists():
            return
        if not output_dir.is_dir():
            raise RunFolderError(f"--output_dir {output_dir}: found a file, expected a folder; name another path")
        if (holder := lock_holder(output_dir)) is not None:
            raise _second_writer(output_dir, holder)
        known = (RECORD_FILE, "inputs.json")
        ours = any((output_dir / name).exists() for name in known)
        if not ours and any(not entry.name.startswith(".") for entry in output_dir.iterdir()):
            raise RunFolderError(
                f"--output_dir {output_dir}: the folder holds files and no {RECORD_FILE}; expected a new or empty "
                "folder, or one of earlier experiments. Name another; nothing was changed"
            )

    @staticmethod
    @contextmanager
    def open(output_dir: Path) -> Iterator[PipelineRecord]:
        """Lock the folder for one writer, and read or start its record.

        Raises:
            RunFolderError: see `check`.
        """
        PipelineRecord.check(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock = FolderLock(output_dir)
        except RunFolderError:
            raise _second_writer(output_dir, lock_holder(output_dir) or "unknown") from None
        try:
            record = PipelineRecord(output_dir, read_record(output_dir))
            record._write()
            yield record
        finally:
            lock.release()

    def set_experiment(self, name: str, stages: Mapping[str, Stage], **facts: Any) -> None:
        """Say what an experiment shows of its stages."""
        self._content["experiments"][name] = {
            **facts,
            "stages": [
                {
                    "name": stage.name,
                    "kind": stage.kind,
                    "key": stage.key,
                    "label": stage.fields.label,
                    "group": stage.fields.group,
                    "folder": stage.folder.name,
                    "depends_on": list(stage.depends_on),
                    "models": dict(stage.models),
                    "reference": list(stage.fields.reference),
                    "evaluation": str(stage.evaluation) if stage.evaluation else None,
                    "pairs": [list(pair) for pair in stage.fields.pairs],
                }
                for stage in stages.values()
            ],
        }
        self._write()

    def stage(self, stage: Stage) -> dict[str, Any]:
        """What is known of a stage's folder; empty: nothing."""
        return dict(self._content["stages"].get(stage.folder.name, {}))

    def set_stage(self, stage: Stage, **facts: Any) -> None:
        """Change what is known of a stage's folder."""
        known = self._content["stages"].setdefault(stage.folder.name, {"kind": stage.kind, "key": stage.key})
        known |= facts
        self._write()

    def seconds_of_kind(self, kind: str) -> list[float]:
        """Seconds of each finished stage of a kind, of all experiments of the folder."""
        stages = self._content["stages"].values()
        return [
            stage["seconds"]
            for stage in stages
            if stage["kind"] == kind and stage.get("state") == "finished" and stage.get("seconds")
        ]

    def view(self, name: str) -> dict[str, Any]:
        """One experiment: its facts, and `stages` with everything that is known of each; folders are whole paths."""
        return experiment_view(self._content, name, self.output_dir)

    def _write(self) -> None:
        write_text(self.output_dir / RECORD_FILE, json.dumps(self._content, indent=1))


def read_record(output_dir: Path) -> dict[str, Any]:
    """The content of an output folder's record, or that of a new one."""
    path = output_dir / RECORD_FILE
    if not path.exists():
        return {"version": __version__, "experiments": {}, "stages": {}}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def experiment_view(content: Mapping[str, Any], name: str, output_dir: Path) -> dict[str, Any]:
    """See `PipelineRecord.view`."""
    experiment = content["experiments"][name]
    stages = [
        {
            "state": "new",
            **stage,
            **content["stages"].get(stage["folder"], {}),
            "folder": str(output_dir / stage["folder"]),
        }
        for stage in experiment["stages"]
    ]
    return {"name": name, **experiment, "stages": stages}


def _second_writer(output_dir: Path, holder: str) -> RunFolderError:
    return RunFolderError(
        f"--output_dir {output_dir}: process {holder} is running an experiment in this folder; wait for it to end, or "
        "name another folder"
    )
