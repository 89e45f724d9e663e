"""From an experiment file and a command line to stages with keys and folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from openrlhf_bd.cli.yaml_files import Given
from openrlhf_bd.experiments.digests import InputDigests
from openrlhf_bd.experiments.files import Experiment, read_experiment
from openrlhf_bd.experiments.layers import Layered, Mode, layered_stages, selected, unread_flags
from openrlhf_bd.experiments.references import Reference
from openrlhf_bd.experiments.scales import FOLDER, Scale, built_inputs, named_inputs, read_scale
from openrlhf_bd.experiments.stages import Stage, keyed_stages


@dataclass(frozen=True, slots=True)
class Request:
    """What a command line asks for.

    Attributes:
        output_dir: absolute; holds the stages' folders.
        scale: name of the scale; None: the default.
        data_dir: `--data`, folder of the data sets.
        mode: offline: as the files say; online: whatever can be.
        only: names of stages, comma-separated; None: all.
        flags: dotted flags, for every job of the experiment.
    """

    output_dir: Path
    scale: str | None = None
    data_dir: Path | None = None
    mode: Mode = "offline"
    only: str | None = None
    flags: Mapping[str, Given] | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """An experiment whose options are all right.

    Attributes:
        experiment: the file.
        scale: what models and data are.
        layered: all stages, in an order in which each comes after those that it refers to.
        asked: names of those that are to be run.
        unread: flags that no stage reads.
    """

    experiment: Experiment
    scale: Scale
    layered: list[Layered]
    asked: list[str]
    unread: list[str]


@dataclass(frozen=True, slots=True)
class Prepared:
    """An experiment that can be run.

    Attributes:
        scale: name of the scale.
        stages: all of them, by name, in an order in which each comes after those that it refers to.
        asked: names of those that are to be run.
    """

    scale: str
    stages: Mapping[str, Stage]
    asked: list[str]


def check_options(path: Path, request: Request) -> Checked:
    """Read an experiment file, lay the options of all stages over each other, and check them. Nothing is written.

    Args:
        path: experiment file.
        request: what is asked for.

    Raises:
        ConfigError: an option, reference or name is wrong.
    """
    experiment = read_experiment(path)
    scale = read_scale(request.scale, beside=path.parent)
    flags = request.flags or {}
    layered = layered_stages(experiment, scale, flags, request.mode)
    return Checked(experiment, scale, layered, selected(layered, request.only), unread_flags(layered, flags))


def prepare(checked: Checked, request: Request, digests: InputDigests, *, inputs_dir: Path) -> Prepared:
    """Find the keys and folders of all stages.

    Args:
        checked: the experiment.
        request: what is asked for.
        digests: of local files.
        inputs_dir: where models and data of a scale are made that has them built; nothing else is written.

    Raises:
        ConfigError: the scale has no such model or data set.
        DataError: data that a stage reads is not there.
    """
    scale, used = checked.scale, _used(checked.layered)
    if scale.built:
        where = str(checked.experiment.path.parent / FOLDER / f"{scale.name}.yaml")
        inputs = built_inputs(scale, inputs_dir, used, where=where)
    else:
        inputs = named_inputs(scale, request.data_dir, used)
    stages = keyed_stages(checked.layered, inputs, digests, request.output_dir)
    return Prepared(scale.name, stages, checked.asked)


def _used(layered: list[Layered]) -> dict[Reference, str]:
    """References to models and data, with `file:line` of one use each."""
    return {
        reference: where for stage in layered for reference, where in stage.uses.items() if reference.kind != "stages"
    }
