"""Running an experiment: its stages in order, in one Ray session, each unless it is finished."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from openrlhf_bd.driver.cluster import ray_session
from openrlhf_bd.driver.job import say_reused
from openrlhf_bd.driver.progress import console
from openrlhf_bd.errors import BDError, ConfigError
from openrlhf_bd.experiments.display import final_table, headline
from openrlhf_bd.experiments.record import PipelineRecord
from openrlhf_bd.experiments.stages import Stage
from openrlhf_bd.experiments.work import Work, work_of


@dataclass(frozen=True, slots=True)
class Run:
    """The stages of an experiment, and which of them this run is about.

    Attributes:
        work: of each stage, by name, in order.
        asked: names of the stages to be run; those that are finished are reused.
    """

    work: Mapping[str, Work]
    asked: Sequence[str]

    def state(self, name: str) -> str:
        """finished, resumes or new."""
        work = self.work[name]
        return "finished" if work.finished() else "resumes" if work.begun else "new"


def make_run(stages: Mapping[str, Stage], asked: Sequence[str]) -> Run:
    """What a run is going to do.

    Args:
        stages: all stages of the experiment, in order.
        asked: names of those to be run.

    Raises:
        ConfigError: a stage that is not asked for and that another one refers to is not finished.
    """
    run = Run({name: work_of(stage) for name, stage in stages.items()}, asked)
    for name in asked:
        if run.work[name].finished():
            continue
        missing = [other for other in stages[name].depends_on if other not in asked and not run.work[other].finished()]
        if missing:
            raise ConfigError(
                f"--only {','.join(asked)}: {name} needs {', '.join(missing)}, which {_is(missing)} not finished; run "
                f"--only {','.join([*missing, *asked])}, or leave --only out"
            )
    return run


def check_run(run: Run) -> dict[str, list[str]]:
    """Look for all that can be known to be wrong before the first stage.

    Returns:
        Warnings, with the stages that each is about.

    Raises:
        BDError: a stage cannot run as it is.
    """
    warnings: dict[str, list[str]] = {}
    for name in run.asked:
        if not run.work[name].finished():
            with _named(name):
                ready = all(run.work[other].finished() for other in run.work[name].stage.depends_on)
                for warning in run.work[name].check(inputs_ready=ready):
                    warnings.setdefault(warning, []).append(name)
    return warnings


def run_stages(run: Run, record: PipelineRecord) -> None:
    """Run every stage that was asked for and is not finished.

    Raises:
        BDError: a stage failed. What is finished is kept; the same command goes on.
        KeyboardInterrupt: likewise.
    """
    waiting = [name for name in run.asked if not run.work[name].finished()]
    for name in run.asked:
        if name not in waiting:
            say_reused(f"stage {name}", str(run.work[name].stage.folder))
            if record.stage(run.work[name].stage).get("state") != "finished":
                record.set_stage(run.work[name].stage, state="finished")
    if waiting:
        with ray_session(num_gpus=max(run.work[name].num_gpus for name in waiting)) as resources:
            for name in waiting:
                run.work[name].check_cluster(resources)
            started = time.monotonic()
            for number, name in enumerate(waiting):
                console.rule(headline(run, waiting, number, record, time.monotonic() - started), align="left")
                _run_stage(run.work[name], record)
    console.print(final_table(run, set(waiting), record))


def _run_stage(work: Work, record: PipelineRecord) -> None:
    stage = work.stage
    known, begun = record.stage(stage), time.monotonic()
    state = "failed"
    try:
        record.set_stage(stage, state="running", started=known.get("started", time.time()), gpus=work.num_gpus)
        with _named(stage.name):
            work.run()
        state = "finished"
    except KeyboardInterrupt:
        state = "interrupted"
        console.print(f"interrupted in stage {stage.name}; finished stages are kept", highlight=False)
        raise
    finally:
        seconds = known.get("seconds", 0.0) + time.monotonic() - begun
        record.set_stage(stage, state=state, seconds=round(seconds, 1))


@contextmanager
def _named(stage: str) -> Iterator[None]:
    """Errors of the block say in which stage they happened, on a line before their own."""
    try:
        yield
    except BDError:
        console.print(f"stage {stage}:", style="bold", highlight=False)
        raise


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
