"""What the stages of each kind do: whether they are finished, what can be checked, and the work itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.cli.flags import resolved_yaml
from openrlhf_bd.config import Config
from openrlhf_bd.driver import job
from openrlhf_bd.driver.comparison import check_evaluated, check_machines
from openrlhf_bd.driver.judge_server import check_serving_cluster
from openrlhf_bd.driver.preflight import preflight
from openrlhf_bd.driver.resources import Stage as JobStage
from openrlhf_bd.driver.resources import check_cluster, stage_actors, takes_part
from openrlhf_bd.driver.run_folder import RunFolder
from openrlhf_bd.driver.teacher_data import rows_path
from openrlhf_bd.experiments.evaluating import evaluate_stage, evaluation_finished
from openrlhf_bd.experiments.judging import check_judge, judge_stage, judging_finished
from openrlhf_bd.experiments.stages import Stage
from openrlhf_bd.store.folder import open_folder
from openrlhf_bd.store.manifest import StoreState


class Work(ABC):
    """The work of one stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    @abstractmethod
    def finished(self) -> bool:
        """Whether an earlier run has done it."""

    @abstractmethod
    def check(self, *, inputs_ready: bool) -> Sequence[str]:
        """Look for all that can be known to be wrong before it starts.

        Args:
            inputs_ready: the stages that it refers to are finished; else its stand-ins are looked at.

        Returns:
            Warnings: what is allowed and probably not meant.

        Raises:
            BDError: with exit status 2.
        """

    @abstractmethod
    def check_cluster(self, resources: Mapping[str, float]) -> None:
        """Compare with what the cluster has.

        Raises:
            ResourceError: the stage needs more.
        """

    @abstractmethod
    def run(self) -> None:
        """Do it, or go on with it. The inputs are there; a Ray session is open."""

    @property
    @abstractmethod
    def num_gpus(self) -> int:
        """GPUs that it needs at once."""

    @property
    def begun(self) -> bool:
        """Whether an earlier run has begun it."""
        return (self.stage.folder / "run.json").exists()


class JobWork(Work):
    """Stages of the main job: the teacher's rows, or the student with the rows that it lacks."""

    def __init__(self, stage: Stage, parts: tuple[JobStage, ...], record: str) -> None:
        """Prepare nothing yet.

        Args:
            stage: the stage.
            parts: what the main job does for it.
            record: what the run folder has when it is finished.
        """
        super().__init__(stage)
        self._parts = parts
        self._record = record

    def finished(self) -> bool:
        if self._record not in RunFolder.finished_stages(self.stage.folder):
            return False
        return self._record != "rows" or _is_whole(self.stage.config)

    def check(self, *, inputs_ready: bool) -> Sequence[str]:
        if inputs_ready:
            return job.check(self.stage.config, stages=self._parts).warnings
        if self.stage.stand_in is None:
            return []
        return preflight(self.stage.stand_in.config, stages=self._parts).warnings

    def check_cluster(self, resources: Mapping[str, float]) -> None:
        check_cluster(self.stage.config, resources, stages=self._parts)

    def run(self) -> None:
        config = self.stage.config
        plan = job.check(config, stages=self._parts)
        job.run(config, resolved_config=resolved_yaml(config), plan=plan, stages=self._parts)

    @property
    def num_gpus(self) -> int:
        config = self.stage.config
        needs = resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill)
        return max(_gpus(config, part) for part in self._parts if takes_part(part, config, needs))


class EvaluateWork(Work):
    """The scores of models on the test sets."""

    def finished(self) -> bool:
        return evaluation_finished(self.stage)

    def check(self, *, inputs_ready: bool) -> Sequence[str]:
        if inputs_ready:
            return check_evaluated(self.stage.config, self.stage.models).warnings
        if self.stage.stand_in is None:
            return []
        return check_evaluated(self.stage.stand_in.config, self.stage.stand_in.models).warnings

    def check_cluster(self, resources: Mapping[str, float]) -> None:
        check_cluster(self.stage.config, resources, stages=("evaluate",))

    def run(self) -> None:
        plan = check_evaluated(self.stage.config, self.stage.models)
        check_machines(self.stage.config, self.stage.models, plan)
        evaluate_stage(self.stage)

    @property
    def num_gpus(self) -> int:
        return _gpus(self.stage.config, "evaluate")


class JudgeWork(Work):
    """A judge's verdicts on pairs of models. Of the cluster it needs what a judge takes that is served here."""

    def finished(self) -> bool:
        return judging_finished(self.stage)

    def check(self, *, inputs_ready: bool) -> Sequence[str]:
        check_judge(self.stage, inputs_ready=inputs_ready)
        return []

    def check_cluster(self, resources: Mapping[str, float]) -> None:
        assert self.stage.judge is not None
        check_serving_cluster(self.stage.judge, resources)

    def run(self) -> None:
        judge_stage(self.stage)

    @property
    def num_gpus(self) -> int:
        assert self.stage.judge is not None
        return 0 if self.stage.judge.serve is None else self.stage.judge.serve_gpus

    @property
    def begun(self) -> bool:
        return self.stage.folder.exists()


def work_of(stage: Stage) -> Work:
    """The work of a stage, by its kind."""
    if stage.kind == "generate":
        return JobWork(stage, ("generate",), "rows")
    if stage.kind == "train":
        return JobWork(stage, ("generate", "train"), "training")
    if stage.kind == "evaluate":
        return EvaluateWork(stage)
    return JudgeWork(stage)


def _gpus(config: Config, part: JobStage) -> int:
    return sum(group.num_gpus for group in stage_actors(config, part))


def _is_whole(config: Config) -> bool:
    """Whether the rows are all there: a repair may have taken some out."""
    path = rows_path(config, resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill))
    state = StoreState.find(open_folder(path))
    return state is not None and state.complete
