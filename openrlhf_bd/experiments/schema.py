"""What an experiment file and a scale file may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints, model_validator

Kind = Literal["train", "generate", "evaluate", "judge"]
# Before the names of the judge's options, on the command line.
JUDGE = "judge."
# Names are parts of folder names, and of references.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# One may stand for a list of one.
Texts = Annotated[list[str], BeforeValidator(_listed)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StageFields(_Fields):
    """One stage of an experiment file.

    Attributes:
        kind: what it does: the student (with the rows that it lacks), the teacher's rows, scores, a judge's verdicts.
        label: its name in tables.
        group: the block of the report that it belongs to.
        extends: option files below `options`, left to right, relative to the experiment file.
        options: of the main job, or of the judge.
        models: evaluate: folder of each model by its label.
        reference: evaluate: labels that are shown and not compared.
        evaluation: judge: the evaluation whose responses are judged.
        pairs: judge: labels that are compared.
    """

    kind: Kind = "train"
    label: str | None = None
    group: str | None = None
    extends: Texts = []
    options: dict[str, Any] = {}
    models: dict[str, str] = {}
    reference: Texts = []
    evaluation: str | None = None
    pairs: list[tuple[str, str]] = []

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> StageFields:
        own = {"evaluate": ("models",), "judge": ("evaluation", "pairs")}
        for kind, names in own.items():
            for name in names:
                if self.kind == kind and not getattr(self, name):
                    raise ValueError(f"a stage of kind {kind} needs {name}")
                if self.kind != kind and getattr(self, name):
                    raise ValueError(f"{name} belongs to stages of kind {kind}, this one is of kind {self.kind}")
        unknown = [label for label in self.reference if label not in self.models]
        if unknown:
            raise ValueError(f"reference names {unknown[0]!r}, which is not in models")
        return self


class ExperimentFields(_Fields):
    """An experiment file.

    Attributes:
        title: of the report.
        include: experiment files whose stages belong to this one too, relative to this file.
        published: names of published figures that stand beside ours.
        stages: by name.
    """

    title: str | None = None
    include: Texts = []
    published: Texts = []
    stages: dict[Name, StageFields] = {}


class ScaleFields(_Fields):
    """A scale file: what models and data are, and options that belong to the size of the machine.

    Attributes:
        inputs: named: `models` and `data` are names and paths; built: `experiments.toy` makes them.
        models: name on a hub or folder of each model; of built ones what to build.
        data: file or folder of each data set, relative to `--data`; of built ones what to build.
        options: over the options of every stage.
        options_by_kind: over those, for stages of a kind.
        options_by_stage: over those, for stages whose names match a pattern (`*-teacher`), in order.
    """

    inputs: Literal["named", "built"] = "named"
    models: dict[str, Any] = {}
    data: dict[str, Any] = {}
    options: dict[str, Any] = {}
    options_by_kind: dict[Kind, dict[str, Any]] = {}
    options_by_stage: dict[str, dict[str, Any]] = {}
