"""Stages whose inputs are known: keys, folders, and the configuration of each job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_bd.cli.flags import build_config, section_from_given
from openrlhf_bd.cli.yaml_files import Given
from openrlhf_bd.config import Config, JudgeOptions
from openrlhf_bd.experiments.digests import InputDigests
from openrlhf_bd.experiments.keys import KEY_LENGTH, STAGE_PREFIX, judge_identity, keyed_identity, model_identity
from openrlhf_bd.experiments.layers import SERVE, STORE, Layered
from openrlhf_bd.experiments.references import Reference, parse_references, substitute, substitute_options
from openrlhf_bd.experiments.scales import Inputs
from openrlhf_bd.experiments.schema import Kind, StageFields
from openrlhf_bd.store.fingerprints import fingerprint_json


@dataclass(frozen=True, slots=True)
class StandIn:
    """What a stage can be checked with before the stages ran that it refers to.

    A student has its architecture and tokenizer from the model that its training begins with.

    Attributes:
        config: of the job.
        models: evaluate: folder or name of each model, by label; judge: that of the judge that is served, as `serve`.
    """

    config: Config
    models: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage with its key.

    Attributes:
        name: in the experiment file.
        fields: what the file says of it.
        key: equal where results are: kind, options that decide them, contents of inputs, keys of stages referred to.
        folder: of the stage.
        depends_on: names of the stages that it refers to.
        config: of its job.
        judge: options of the judge, where the stage is one.
        models: evaluate: folder of each model, by label.
        model_keys: evaluate: equal where the scores of a model are, by label.
        evaluation: judge: folder of the evaluation.
        stand_in: for checks before its inputs are there; None: too little is known then.
    """

    name: str
    fields: StageFields
    key: str
    folder: Path
    depends_on: tuple[str, ...]
    config: Config
    judge: JudgeOptions | None
    models: Mapping[str, str]
    model_keys: Mapping[str, str]
    evaluation: Path | None
    stand_in: StandIn | None

    @property
    def kind(self) -> Kind:
        return self.fields.kind


def keyed_stages(
    layered: Sequence[Layered], inputs: Inputs, digests: InputDigests, output_dir: Path
) -> dict[str, Stage]:
    """Keys, folders and configurations of all stages, by name.

    Args:
        layered: in an order in which each comes after those that it refers to.
        inputs: what references to models and data stand for.
        digests: of local files.
        output_dir: absolute; holds the stages' folders.

    Raises:
        ConfigError: the scale has no such model or data set.
    """
    done: dict[str, Stage] = {}
    for stage in layered:
        done[stage.spec.name] = _keyed(stage, done, inputs, digests, output_dir)
    return done


def _keyed(stage: Layered, done: Mapping[str, Stage], inputs: Inputs, digests: InputDigests, output_dir: Path) -> Stage:
    def values(stage_value: Callable[[str], str]) -> Callable[[Reference], str]:
        def value(reference: Reference) -> str:
            known = reference.kind != "stages"
            return inputs.value_of(reference, stage.uses[reference]) if known else stage_value(reference.name)

        return value

    fields = stage.spec.fields
    by_key = values(lambda name: STAGE_PREFIX + done[name].key)
    by_folder = values(lambda name: str(done[name].folder))
    given = {} if stage.judge is not None else stage.given
    identity = keyed_identity(build_config(substitute_options(given, by_key)), digests)
    model_keys = {
        label: fingerprint_json([label, model_identity(substitute(path, by_key), digests), identity])
        for label, path in fields.models.items()
    }
    decisive: dict[str, Any] = {"kind": fields.kind, "options": identity, "models": model_keys}
    if stage.judge is not None:
        options = section_from_given(JudgeOptions, substitute_options(stage.given, by_key))
        judge = judge_identity(options, fields.pairs, digests)
        decisive = {"kind": fields.kind, "judge": judge, "evaluation": substitute(str(fields.evaluation), by_key)}
    key = fingerprint_json(decisive)
    folder = _folder(stage.spec.name, key, done, output_dir)
    own_folder = {"ckpt.output_dir": Given(str(folder), str(folder), stage.spec.where)}
    return Stage(
        name=stage.spec.name,
        fields=fields,
        key=key,
        folder=folder,
        depends_on=stage.depends_on,
        config=build_config({**substitute_options(given, by_folder), **own_folder}),
        judge=section_from_given(JudgeOptions, substitute_options(stage.given, by_folder)) if stage.judge else None,
        models={label: substitute(path, by_folder) for label, path in fields.models.items()},
        model_keys=model_keys,
        evaluation=Path(substitute(fields.evaluation, by_folder)) if fields.evaluation else None,
        stand_in=_stand_in(stage, own_folder, done, values(lambda name: str(_starting_model(done[name])))),
    )


def _folder(name: str, key: str, done: Mapping[str, Stage], output_dir: Path) -> Path:
    """`NAME-KEY`; where a stage of the same key has a folder, under whatever name, that one."""
    same = [stage.folder for stage in done.values() if stage.key == key]
    there = sorted(path for path in output_dir.glob(f"*-{key[:KEY_LENGTH]}") if path.is_dir())
    return next(iter([*same, *there]), output_dir / f"{name}-{key[:KEY_LENGTH]}")


def _stand_in(
    stage: Layered,
    own_folder: Mapping[str, Given],
    done: Mapping[str, Stage],
    by_start: Callable[[Reference], str],
) -> StandIn | None:
    # Rows that are not there yet are looked at when it is the stage's turn.
    given = {
        name: item
        for name, item in stage.given.items()
        if not (name == STORE and item.text is not None and parse_references(item.text, item.where))
    }
    texts = [item.text or "" for item in given.values()] + list(stage.spec.fields.models.values())
    referred = {
        reference.name
        for text in texts
        for reference in parse_references(text, stage.spec.where)
        if reference.kind == "stages"
    }
    if any(_starting_model(done[name]) is None for name in referred):
        return None
    if stage.judge is not None:
        served = stage.judge.serve
        return StandIn(stage.template, {} if served is None else {SERVE: substitute(served, by_start)})
    config = build_config({**substitute_options(given, by_start), **own_folder})
    return StandIn(config, {label: substitute(path, by_start) for label, path in stage.spec.fields.models.items()})


def _starting_model(stage: Stage) -> str | None:
    """The model that a training begins with, before any stage ran."""
    if stage.kind != "train" or stage.stand_in is None:
        return None
    return stage.stand_in.config.actor.model_name_or_path
