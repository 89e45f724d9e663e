"""Scales: what the models and data of an experiment are, and the options that belong to the size of the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from openrlhf_bd.cli.options import nearest
from openrlhf_bd.cli.yaml_files import Given
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.experiments.files import options_at
from openrlhf_bd.experiments.references import Reference
from openrlhf_bd.experiments.schema import Kind, ScaleFields
from openrlhf_bd.experiments.yaml_fields import child, read_fields
from openrlhf_bd.paths import looks_like_path, nearest_path_hint
from openrlhf_bd.store.fingerprints import fingerprint_json

DEFAULT_SCALE = "full"
FOLDER = "scales"


@dataclass(frozen=True, slots=True)
class Scale:
    """A scale file.

    Attributes:
        name: of the scale.
        built: whether `experiments.toy` makes models and data.
        models: as the file names or describes them.
        data: as the file names or describes them.
        options: over every stage's.
        options_by_kind: over those, by kind.
        options_by_stage: over those, by pattern of the stage's name.
    """

    name: str
    built: bool
    models: Mapping[str, Any]
    data: Mapping[str, Any]
    options: Mapping[str, Given]
    options_by_kind: Mapping[Kind, Mapping[str, Given]]
    options_by_stage: Mapping[str, Mapping[str, Given]]

    def options_of(self, stage: str, kind: Kind) -> dict[str, Given]:
        """The options that the scale lays over a stage's own."""
        if kind == "judge":
            return dict(self.options_by_kind.get(kind, {}))
        given = {**self.options, **self.options_by_kind.get(kind, {})}
        for pattern, options in self.options_by_stage.items():
            if fnmatchcase(stage, pattern):
                given |= options
        return given


def read_scale(name: str | None, *, beside: Path) -> Scale:
    """The scale `scales/NAME.yaml` beside an experiment file.

    Args:
        name: of the scale; None: `full` if there is one, else one that names nothing.
        beside: folder of the experiment file.

    Raises:
        ConfigError: there is no such scale, or its file is not what it should be.
    """
    path = beside / FOLDER / f"{name or DEFAULT_SCALE}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in (beside / FOLDER).glob("*.yaml"))
        if name is None and not known:
            return Scale("none", False, {}, {}, {}, {}, {})
        there = f"scales there: {', '.join(known)}" if known else f"there is no folder {beside / FOLDER}"
        raise ConfigError(f"--scale {name or DEFAULT_SCALE}: there is no {path}; {there}")
    fields, root = read_fields(path, ScaleFields, asked_by="--scale")

    return Scale(
        name=path.stem,
        built=fields.inputs == "built",
        models=fields.models,
        data=fields.data,
        options=options_at(path, child(root, "options")) if fields.options else {},
        options_by_kind={
            kind: options_at(path, child(root, "options_by_kind", kind), kind) for kind in fields.options_by_kind
        },
        options_by_stage={
            pattern: options_at(path, child(root, "options_by_stage", pattern)) for pattern in fields.options_by_stage
        },
    )


@dataclass(frozen=True, slots=True)
class Inputs:
    """What `${models.NAME}` and `${data.NAME}` stand for: names on a hub, or absolute paths."""

    scale: str
    models: Mapping[str, str]
    data: Mapping[str, str]

    def value_of(self, reference: Reference, where: str) -> str:
        """The value of a reference.

        Raises:
            ConfigError: the scale has no such model or data set.
        """
        known = self.models if reference.kind == "models" else self.data
        if not self.models and not self.data:
            raise ConfigError(
                f"{where}: {reference}: no scale says what that is; expected {FOLDER}/{DEFAULT_SCALE}.yaml beside the "
                "experiment file (docs/reproduce.md), or a path in the place of the reference"
            )
        if reference.name not in known:
            guess = nearest(reference.name, known)
            hint = f"; did you mean {guess}?" if guess else f"; it has {', '.join(known) or 'none'}"
            raise ConfigError(f"{where}: {reference}: scale {self.scale} has no such name under {reference.kind}{hint}")
        return known[reference.name]


def named_inputs(scale: Scale, data_dir: Path | None, used: Mapping[Reference, str]) -> Inputs:
    """Models and data of a scale that names them.

    Args:
        scale: the scale.
        data_dir: `--data`, where relative data paths begin.
        used: the references of the experiment, with `file:line` of one use each. What nobody uses may be missing.

    Raises:
        ConfigError: data that the experiment uses has a relative path, and `--data` is not given.
        DataError: it is not there.
    """
    wanted = {reference.name: where for reference, where in used.items() if reference.kind == "data"}
    data = {name: _data_path(name, str(path), data_dir, wanted.get(name)) for name, path in scale.data.items()}
    return Inputs(scale.name, {name: _model(str(path)) for name, path in scale.models.items()}, data)


def _model(name: str) -> str:
    return str(Path(name).expanduser().absolute()) if looks_like_path(name) else name


def _data_path(name: str, entry: str, data_dir: Path | None, where: str | None) -> str:
    path = Path(entry).expanduser()
    if not path.is_absolute():
        if data_dir is None:
            if where is not None:
                raise ConfigError(
                    f"{where}: ${{data.{name}}} is {entry} under --data, which is not given; name a folder"
                )
            return entry
        path = data_dir / path
    path = path.absolute()
    if where is not None and not path.exists():
        raise DataError(f"{where}: ${{data.{name}}} is {path}, which does not exist{nearest_path_hint(path)} (--data)")
    return str(path)


def built_inputs(scale: Scale, folder: Path, used: Mapping[Reference, str], *, where: str) -> Inputs:
    """Models and data of a scale that describes them: those that the experiment uses are made, unless they are there.

    Args:
        scale: the scale.
        folder: where they are made; the name of each says what it was made from.
        used: as for `named_inputs`.
        where: the scale's file, for messages.

    Raises:
        ConfigError: a description is wrong.
    """
    from openrlhf_bd.experiments.toy import make_data, make_model, read_toy_data, read_toy_models

    def place(kind: str, description: Any) -> str:
        return f"{kind}-{fingerprint_json(description)[:8]}"

    toy_models, toy_data = read_toy_models(scale.models, where=where), read_toy_data(scale.data, where=where)
    names = {kind: {reference.name for reference in used if reference.kind == kind} for kind in ("models", "data")}
    models = {
        name: str(make_model(toy_models[name], folder / "models" / place(name, scale.models[name])).absolute())
        for name in toy_models
        if name in names["models"]
    }
    data = make_data(toy_data, folder / place("data", scale.data)) if names["data"] else {}
    # Of what nobody uses the name is enough.
    known = {name: models.get(name, name) for name in toy_models}
    return Inputs(scale.name, known, {name: str(path.absolute()) for name, path in data.items()})
