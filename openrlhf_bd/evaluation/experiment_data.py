"""An experiment as the comparison reads it: the stages of `pipeline.json`, and what their folders hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.models import EvaluatedModel
from openrlhf_bd.evaluation.published import Published, published
from openrlhf_bd.evaluation.results import Evaluation, labelled_paths
from openrlhf_bd.evaluation.run_data import CONFIG_FILE, METRICS_FILE, RunData, scores_by_prompt

FINISHED = "finished"
# Label of a reference where a record does not say which labels are.
_TEACHER = "Teacher"


@dataclass(frozen=True, slots=True)
class StageRecord:
    """A stage of an experiment, as `pipeline.json` records it.

    Attributes:
        name: of the stage.
        kind: "train", "generate", "evaluate" or "judge".
        label: row in tables, or None.
        group: block of the comparison, or None.
        folder: what it made.
        state: "finished", "failed", "running", "interrupted"; "" where it has not begun.
        started: unix seconds of its first start, or None.
        seconds: wall time of all its starts together, or None.
        gpus: accelerators that it held, or None.
        models: of an evaluation: label -> folder or name of the model.
        reference: labels of an evaluation that are shown but not compared.
    """

    name: str
    kind: str
    label: str | None
    group: str | None
    folder: Path
    state: str
    started: float | None
    seconds: float | None
    gpus: float | None
    models: Mapping[str, str]
    reference: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return self.state == FINISHED


@dataclass(frozen=True, slots=True)
class Group:
    """Methods that are compared with each other: one student, one teacher.

    Attributes:
        name: such as "GPT-2 120M".
        methods: in the order of their evaluation; labels differ.
        reference_labels: methods that are shown but not compared.
    """

    name: str
    methods: tuple[RunData, ...]
    reference_labels: frozenset[str]

    @property
    def compares(self) -> bool:
        """Whether there is more than one method, or a score of the only one."""
        return len(self.methods) > 1 or any(run.evaluation is not None for run in self.methods)

    def method(self, label: str) -> RunData | None:
        """The method of this name, whatever its case."""
        return next((run for run in self.methods if run.label.casefold() == label.casefold()), None)


@dataclass(frozen=True, slots=True)
class ExperimentData:
    """A whole experiment.

    Attributes:
        title: heading.
        scale: "full", "toy" or what the record says.
        published: the paper's tables and figures that stand beside ours.
        stages: all stages, in order.
        groups: blocks of methods, in order.
    """

    title: str
    scale: str
    published: tuple[Published, ...]
    stages: tuple[StageRecord, ...]
    groups: tuple[Group, ...]

    def find_published(self, group: str, label: str, column: str) -> float | None:
        """The first published figure of this row, in the order of the tables."""
        found = (table.find(group, label, column) for table in self.published)
        return next((figure for figure in found if figure is not None), None)

    @property
    def methods(self) -> tuple[RunData, ...]:
        """The methods of all groups."""
        return tuple(run for group in self.groups for run in group.methods)


def read_pipeline(pipeline: Mapping[str, Any]) -> ExperimentData:
    """Read what the stages of an experiment left.

    Args:
        pipeline: one experiment of `pipeline.json`: title, scale, published, and its stages in order, with whole paths.

    Raises:
        DataError: the record has no stages, or a file of a stage is damaged.
    """
    records = pipeline.get("stages")
    if not isinstance(records, Sequence) or not all(isinstance(record, Mapping) for record in records):
        raise DataError('the record of the experiment has no "stages"; expected a list of them, as in pipeline.json')
    stages = tuple(_stage(record) for record in records)
    names = _texts(pipeline.get("published"))
    return ExperimentData(
        title=str(pipeline.get("title") or pipeline.get("name") or "Experiment"),
        scale=str(pipeline.get("scale") or ""),
        published=tuple(published(name) for name in dict.fromkeys(names)),
        stages=stages,
        # A teacher's own group compares nothing: it comes last.
        groups=tuple(sorted(_groups(stages), key=lambda group: not group.compares)),
    )


def _stage(record: Mapping[str, Any]) -> StageRecord:
    name = str(record.get("name", "?"))
    return StageRecord(
        name=name,
        kind=str(record.get("kind", "train")),
        label=record.get("label"),
        group=record.get("group"),
        folder=Path(str(record.get("folder", name))),
        state=str(record.get("state", "")),
        started=record.get("started"),
        seconds=record.get("seconds"),
        gpus=record.get("gpus"),
        models={str(label): str(path) for label, path in (record.get("models") or {}).items()},
        reference=tuple(_texts(record.get("reference"))),
    )


def _groups(stages: Iterable[StageRecord]) -> Iterable[Group]:
    """Groups in the order in which they first appear; methods that were evaluated come before those only trained."""
    by_name: dict[str, list[StageRecord]] = {}
    for stage in stages:
        if stage.group:
            by_name.setdefault(stage.group, []).append(stage)
    for name, members in by_name.items():
        trained = {str(stage.folder): stage for stage in members if stage.kind == "train"}
        methods: dict[str, RunData] = {}
        references: set[str] = set()
        for evaluated in (stage for stage in members if stage.kind == "evaluate"):
            references |= set(evaluated.reference or [label for label in evaluated.models if label == _TEACHER])
            for label, model in evaluated.models.items():
                found = _evaluated(evaluated, label, model)
                methods[label] = found if label not in methods else _merged(methods[label], found)
        known = {run.folder for run in methods.values()}
        for stage in trained.values():
            label = stage.label or stage.name
            if stage.folder.name not in known and label not in methods:
                methods[label] = _trained(stage.folder, label)
        if methods:
            yield Group(name, tuple(methods.values()), frozenset(references))


def _evaluated(stage: StageRecord, label: str, model: str) -> RunData:
    """A method with its run, where its model is the folder of one, and its scores from the folder of the evaluation."""
    chosen = EvaluatedModel.parse(model)
    run = RunData(label)
    if chosen.temperature is None:
        # The same model at another temperature is a sampler of its own, not another run.
        run = _trained(stage.folder.parent / chosen.path, label)
    path = labelled_paths(stage.folder, stage.models)[label]
    if not path.exists():
        return replace(run, missing=[*run.missing, f"not evaluated by {stage.name}"])
    evaluation = Evaluation.read(path)
    return replace(run, evaluation=evaluation, by_prompt=scores_by_prompt(path, evaluation))


def _trained(folder: Path, label: str) -> RunData:
    """What is known of a run; scores of its own are not those of the comparison."""
    if not any((folder / name).exists() for name in (CONFIG_FILE, METRICS_FILE)):
        return RunData(label, folder=folder.name)
    run = RunData.load(folder, label=label)
    missing = [text for text in run.missing if not text.startswith("evaluation.json")]
    return replace(run, evaluation=None, by_prompt={}, missing=missing)


def _merged(run: RunData, other: RunData) -> RunData:
    """A method that two stages evaluated, on other test sets each."""
    if run.evaluation is None or other.evaluation is None:
        return run if other.evaluation is None else other
    datasets = run.evaluation.datasets | other.evaluation.datasets
    samples = [*run.evaluation.samples, *other.evaluation.samples]
    evaluation = run.evaluation.model_copy(update={"datasets": datasets, "samples": samples})
    return replace(run, evaluation=evaluation, by_prompt={**run.by_prompt, **other.by_prompt})


def _texts(found: Any) -> list[str]:
    if isinstance(found, str):
        return [found]
    return [str(item) for item in found] if isinstance(found, list | tuple) else []
