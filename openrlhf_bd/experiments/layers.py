"""From the stages of a file to their options: pieces < stage < scale < mode < command line; and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.cli.flags import COMMAND_LINE, build_config, section_from_given
from openrlhf_bd.cli.options import nearest
from openrlhf_bd.cli.yaml_files import Given
from openrlhf_bd.config import Config, JudgeOptions
from openrlhf_bd.data.test_sets import parse_test_datasets
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.experiments.files import Experiment, StageSpec, refuse_folders
from openrlhf_bd.experiments.references import Reference, parse_references, references_of
from openrlhf_bd.experiments.scales import Scale
from openrlhf_bd.experiments.schema import JUDGE, Kind

Mode = Literal["offline", "online"]

STORE = "teacher.store_path"
# Of a judge: the model that is hosted while it judges.
SERVE = "serve"
_MODE = "algo.distill.mode"
# What each kind of job reads of the options, and what not of these, by the beginnings of their names. The others, of
# pieces that several kinds share, are left out, so that they decide nothing there.
_READS: dict[Kind, tuple[str, ...]] = {
    "train": ("",),
    "generate": ("algo.", "teacher.", "rollout.", "data.", "train.seed", "cluster.", "logger.", "trust_remote_code"),
    "evaluate": ("eval.", "teacher.", "vllm.", "data.", "train.seed", "cluster.", "logger.", "trust_remote_code"),
}
_READS_NOT: dict[Kind, tuple[str, ...]] = {
    "train": ("eval.test_", "eval.teacher_nll", "eval.exposure"),
    "generate": ("data.pretrain_",),
    "evaluate": (
        *("data.pretrain_", "data.prompt_dataset", "data.prompt_probs", "data.prompt_split", "teacher.store_path"),
        *("eval.dataset", "eval.steps", "eval.max_samples", "eval.top_p"),
    ),
}


@dataclass(frozen=True, slots=True)
class Layered:
    """A stage with all its options, references not yet replaced.

    Attributes:
        spec: what the file says.
        given: options with their origins.
        uses: `file:line` of one use of each reference.
        template: options of the main job, their types and combinations checked; texts still have their references.
        judge: options of the judge, where the stage is one.
    """

    spec: StageSpec
    given: Mapping[str, Given]
    uses: Mapping[Reference, str]
    template: Config
    judge: JudgeOptions | None

    @property
    def depends_on(self) -> tuple[str, ...]:
        """Names of the stages that this one refers to."""
        return tuple(reference.name for reference in self.uses if reference.kind == "stages")


def layered_stages(experiment: Experiment, scale: Scale, flags: Mapping[str, Given], mode: Mode) -> list[Layered]:
    """All stages in an order in which each comes after those that it refers to; else as the file has them.

    Args:
        experiment: the stages.
        scale: options over the stages' own.
        flags: dotted flags of the command line, over all others.
        mode: online: whatever can learn from the student's own responses does so while it trains.

    Raises:
        ConfigError: an option or reference is wrong, or stages refer to each other in a circle.
    """
    refuse_folders(flags)
    given = {name: _given(spec, scale, flags) for name, spec in experiment.stages.items()}
    stages = {name: _layered(spec, given[name]) for name, spec in experiment.stages.items()}
    if mode == "online":
        stages = _switched(stages)
    ordered = [stages[name] for name in _order(stages)]
    for stage in ordered:
        if stage.judge is not None:
            _check_judge(stage, stage.judge, stages)
    return ordered


def unread_flags(stages: Sequence[Layered], flags: Mapping[str, Given]) -> list[str]:
    """Names of the flags that reach no stage: of a judge where there is none, of training where nothing is trained.

    Args:
        stages: all of the experiment.
        flags: dotted flags of the command line.
    """
    read = {
        (JUDGE if stage.judge is not None else "") + name
        for stage in stages
        for name, item in stage.given.items()
        if item.where == COMMAND_LINE
    }
    return [name for name in flags if name not in read]


def _given(spec: StageSpec, scale: Scale, flags: Mapping[str, Given]) -> dict[str, Given]:
    if spec.kind == "judge":
        own = {name.removeprefix(JUDGE): item for name, item in flags.items() if name.startswith(JUDGE)}
        return {**spec.given, **scale.options_of(spec.name, spec.kind), **own}
    own = {name: item for name, item in flags.items() if not name.startswith(JUDGE)}
    given = {**spec.given, **scale.options_of(spec.name, spec.kind), **own}
    reads, reads_not = _READS[spec.kind], _READS_NOT[spec.kind]
    return {name: item for name, item in given.items() if name.startswith(reads) and not name.startswith(reads_not)}


def _layered(spec: StageSpec, given: Mapping[str, Given]) -> Layered:
    uses: dict[Reference, str] = {}
    for _, reference, where in references_of(given):
        uses.setdefault(reference, where)
    for text in (*spec.fields.models.values(), spec.fields.evaluation or ""):
        for reference in parse_references(text, spec.where):
            uses.setdefault(reference, spec.where)
    try:
        if spec.kind == "judge":
            return Layered(spec, given, uses, Config(), section_from_given(JudgeOptions, given))
        config = build_config(dict(given))
        resolve_algorithm(config.algo.distill.name)
        return Layered(spec, given, uses, config, None)
    except ConfigError as error:
        raise ConfigError(f"{error} (stage {spec.name} at {spec.where})") from None


def _switched(stages: Mapping[str, Layered]) -> dict[str, Layered]:
    """Each stage online that can be, without the rows that it would read; rows that nobody reads any more go too."""
    switched = {name: _online(stage) for name, stage in stages.items()}
    before, after = _referred(stages), _referred(switched)
    return {
        name: stage
        for name, stage in switched.items()
        if stage.spec.kind != "generate" or name in after or name not in before
    }


def _online(stage: Layered) -> Layered:
    distill = stage.template.algo.distill
    if stage.spec.kind != "train" or distill.mode != "offline":
        return stage
    needs = resolve_algorithm(distill.name).needs_of(distill)
    if needs.rollouts == "gold" or needs.student_rollouts == "never":
        return stage
    given = {name: item for name, item in stage.given.items() if name != STORE}
    given[_MODE] = Given("online", "online", "--mode online")
    return _layered(stage.spec, given)


def _referred(stages: Mapping[str, Layered]) -> set[str]:
    return {name for stage in stages.values() for name in stage.depends_on}


def _order(stages: Mapping[str, Layered]) -> list[str]:
    ordered: list[str] = []
    open_stages: list[str] = []

    def visit(name: str) -> None:
        if name in ordered:
            return
        if name in open_stages:
            circle = [*open_stages[open_stages.index(name) :], name]
            where = stages[name].spec.where
            raise ConfigError(f"{where}: stages refer to each other in a circle: {' -> '.join(circle)}")
        open_stages.append(name)
        for reference, where in stages[name].uses.items():
            if reference.kind == "stages":
                _require_stage(reference.name, stages, where)
                visit(reference.name)
        open_stages.pop()
        ordered.append(name)

    for name in stages:
        visit(name)
    return ordered


def _check_judge(stage: Layered, options: JudgeOptions, stages: Mapping[str, Layered]) -> None:
    """What a judge compares must be what an evaluation stage samples."""
    where = stage.spec.where
    judged = [stages[other.name] for other in parse_references(stage.spec.fields.evaluation or "", where)]
    if len(judged) != 1 or judged[0].spec.kind != "evaluate":
        raise ConfigError(
            f"{where}: evaluation is {stage.spec.fields.evaluation!r}; expected ${{stages.NAME}} of a stage of kind "
            "evaluate"
        )
    for reference in parse_references(options.serve or "", where):
        if reference.kind == "stages" and (kind := stages[reference.name].spec.kind) != "train":
            raise ConfigError(
                f"{stage.given[SERVE].where}: serve is {reference}, a stage of kind {kind}; expected one of kind train"
            )
    evaluation, config = judged[0].spec, judged[0].template.eval
    labels = list(evaluation.fields.models)
    for label in (label for pair in stage.spec.fields.pairs for label in pair):
        if label not in labels:
            raise ConfigError(
                f"{where}: pairs name {label!r}, which {evaluation.name} does not evaluate; it has {', '.join(labels)}"
            )
    known: dict[str, Sequence[Any]] = {
        "test_set": list(parse_test_datasets(config.test_datasets or "none")),
        "seed": config.seeds,
        "top_p": config.test_top_p,
    }
    for name, values in known.items():
        if getattr(options, name) not in values:
            origin = stage.given[name].where if name in stage.given else where
            raise ConfigError(
                f"{origin}: the judge's {name} is {getattr(options, name)}, which {evaluation.name} does not sample; "
                f"it has {', '.join(str(value) for value in values)}"
            )


def _require_stage(name: str, stages: Mapping[str, Layered], where: str) -> None:
    if name not in stages:
        guess = nearest(name, stages)
        hint = f"did you mean ${{stages.{guess}}}?" if guess else f"stages: {', '.join(stages)}"
        raise ConfigError(f"{where}: ${{stages.{name}}}: there is no such stage; {hint}")


def selected(stages: list[Layered], only: str | None) -> list[str]:
    """Names of the stages that `--only` asks for; all of them where it is not given.

    Raises:
        ConfigError: it names a stage that there is not.
    """
    names = [stage.spec.name for stage in stages]
    if only is None:
        return names
    asked = [name.strip() for name in only.split(",")]
    for name in asked:
        if name not in names:
            guess = nearest(name, names)
            hint = f"did you mean {guess}?" if guess else f"stages: {', '.join(names)}"
            raise ConfigError(f"--only {name}: the experiment has no such stage; {hint}")
    return [name for name in names if name in asked]
