"""Experiment files: stages with the options that their files give, before a scale and a command line come over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from openrlhf_bd.cli.options import section_options
from openrlhf_bd.cli.yaml_files import Given, given_options, given_section, parse_yaml, place_of, read_config_file
from openrlhf_bd.config import JudgeOptions
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.evaluation.published import published as find_published
from openrlhf_bd.experiments.schema import ExperimentFields, Kind, StageFields
from openrlhf_bd.experiments.yaml_fields import child, read_fields
from openrlhf_bd.paths import nearest_path_hint

# A stage's folder follows from its key.
_OWN_FOLDER = ("ckpt.output_dir", "ckpt.path")


@dataclass(frozen=True, slots=True)
class StageSpec:
    """A stage as its file says it.

    Attributes:
        name: of the stage.
        fields: what the file says of it.
        given: options of its pieces and of itself: of the main job, of a judge stage those of the judge.
        where: `file:line`.
    """

    name: str
    fields: StageFields
    given: Mapping[str, Given]
    where: str = field(compare=False)

    @property
    def kind(self) -> Kind:
        return self.fields.kind

    def same_as(self, other: StageSpec) -> bool:
        """Whether two files say the same of a stage, wherever its options come from."""
        mine, theirs = (spec.fields.model_copy(update={"extends": [], "options": {}}) for spec in (self, other))
        values, others = ({name: item.value for name, item in spec.given.items()} for spec in (self, other))
        return mine == theirs and values == others


@dataclass(frozen=True, slots=True)
class Experiment:
    """An experiment file with all that it includes.

    Attributes:
        path: the file.
        title: of the report.
        published: names of published figures.
        stages: by name, included ones first.
    """

    path: Path
    title: str
    published: tuple[str, ...]
    stages: Mapping[str, StageSpec]

    @property
    def name(self) -> str:
        return self.path.stem


def read_experiment(path: Path) -> Experiment:
    """Read an experiment file and those that it includes.

    Raises:
        ConfigError: a file is missing or not what it should be, files include each other in a circle, two stages have
            the same name, or there is no stage; the message names file and line.
    """
    fields, _ = read_fields(path, ExperimentFields, asked_by="experiment file")
    published: list[str] = []
    stages: dict[str, StageSpec] = {}
    _collect(path, stages, published, seen=())
    if not stages:
        raise ConfigError(f"{path}: has no stages; expected `stages:` with at least one, or `include:`")
    return Experiment(path, fields.title or path.stem, tuple(dict.fromkeys(published)), stages)


def _collect(path: Path, stages: dict[str, StageSpec], published: list[str], *, seen: tuple[Path, ...]) -> None:
    """Stages of a file, after those of the files that it includes."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: includes itself through {seen[-1]}; take one `include` out")
    asked_by = f"included by {seen[-1]}" if seen else "experiment file"
    fields, root = read_fields(path, ExperimentFields, asked_by=asked_by)
    for name in fields.include:
        _collect(path.parent / name, stages, published, seen=(*seen, path.resolve()))
    for figures in fields.published:
        _check_published(figures, place_of(path, child(root, "published")))
    published += fields.published
    for name, stage in fields.stages.items():
        spec = _stage(path, name, stage, child(root, "stages", name))
        other = stages.setdefault(name, spec)
        if not other.same_as(spec):
            raise ConfigError(
                f"{spec.where}: stage {name} is another than the one at {other.where}; give one of them another name, "
                "or say it once and include that file"
            )


def _check_published(name: str, where: str) -> None:
    """The report would find out after all stages."""
    try:
        find_published(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _stage(path: Path, name: str, fields: StageFields, node: yaml.Node) -> StageSpec:
    given: dict[str, Given] = {}
    for piece in fields.extends:
        given |= _piece(path.parent / piece, fields.kind, place_of(path, child(node, "extends")))
    if fields.options:
        given |= options_at(path, child(node, "options"), fields.kind)
    return StageSpec(name, fields, given, place_of(path, node))


def options_at(path: Path, node: yaml.Node, kind: Kind | None = None) -> dict[str, Given]:
    """The options that a mapping gives, with their origins.

    Args:
        path: file of the mapping.
        node: the mapping.
        kind: of the stages that they are for; None: of any that have options of the main job.

    Raises:
        ConfigError: a key is unknown, or is the folder, which is the stage's own.
    """
    if not isinstance(node, yaml.MappingNode):
        return {}
    if kind == "judge":
        return given_section(path, node, section_options(JudgeOptions))
    given = given_options(path, node)
    refuse_folders(given)
    return given


def refuse_folders(given: Mapping[str, Given]) -> None:
    """Raises ConfigError where options name a stage's folder."""
    for name in _OWN_FOLDER:
        if name in given:
            raise ConfigError(f"{given[name].where}: {name} cannot be given: each stage has a folder of its own")


def _piece(path: Path, kind: Kind, where: str) -> dict[str, Given]:
    if not path.is_file():
        raise ConfigError(f"{where}: extends {path}, and there is no such file{nearest_path_hint(path)}")
    if kind == "judge":
        root = parse_yaml(path, asked_by=where)
        return options_at(path, root, kind) if root is not None else {}
    given = read_config_file(path)
    refuse_folders(given)
    return given
