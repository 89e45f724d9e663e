"""Training the student: DeepSpeed ranks step by step, validation through vLLM, selection of the best student."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray.util.placement_group import PlacementGroup
from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.driver.cluster import placed
from openrlhf_bd.driver.engines import student_engines
from openrlhf_bd.driver.metrics import METRICS_FILE, MetricsLog, Stopwatch, truncate_metrics, wall_clock_rates
from openrlhf_bd.driver.progress import console, stage_progress
from openrlhf_bd.driver.run_folder import RunFolder
from openrlhf_bd.driver.schedule import Schedule
from openrlhf_bd.driver.selection import (
    LOSS,
    SNAPSHOT_SUFFIX,
    Selection,
    Snapshots,
    selection_metric,
    validates_by_sampling,
)
from openrlhf_bd.driver.timeline import collected, driver_span
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.evaluation.evaluate import validate
from openrlhf_bd.evaluation.timeline import RANKS
from openrlhf_bd.records import Prompt
from openrlhf_bd.rollout.calls import wait_for
from openrlhf_bd.student.actor import ACTOR_FOLDER
from openrlhf_bd.student.checkpoints import newest_tag
from openrlhf_bd.student.row_source import RowStores
from openrlhf_bd.student.strategy import checkpoint_folder


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """What a training stage reads.

    Attributes:
        stores: of the rows.
        schedule: steps of the stage.
        pretrain_path: pre-training blocks (.npy), or None.
        validation: validation prompts, empty where there are none.
        tokenizer: the student's.
        stop_ids: tokens that end a response.
        checker: exact correctness of a response, or None.
    """

    stores: RowStores
    schedule: Schedule
    pretrain_path: Path | None
    validation: Sequence[Prompt]
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    checker: Any


def check_start(start_step: int, num_steps: int, *, tag: str | None, config: Config) -> None:
    """Refuse a checkpoint of more steps than the run has: nothing would be trained.

    Args:
        start_step: steps that the checkpoint has behind it; 0 without one.
        num_steps: of the run.
        tag: the checkpoint's.
        config: options of the job.

    Raises:
        ConfigError: it is another run's checkpoint (--ckpt.load_enable), of a longer one.
    """
    if start_step > num_steps:
        raise ConfigError(
            f"--ckpt.path {checkpoint_folder(config)}: checkpoint {tag} has {start_step} steps behind it and this run "
            f"has {num_steps}, so nothing would be trained; give more steps, or start from that run's student by "
            "--actor.model_name_or_path without --ckpt.load_enable"
        )


def saves_checkpoints(config: Config) -> bool:
    """Whether a run leaves checkpoints to resume from."""
    return config.ckpt.save_steps > 0 and not config.ckpt.disable_ds


def is_checkpoint_step(config: Config, step: int) -> bool:
    """Whether a step is followed by a checkpoint, the student as a Hugging Face model (ckpt.save_hf), or both."""
    ckpt = config.ckpt
    return ckpt.save_steps > 0 and (ckpt.save_hf or not ckpt.disable_ds) and step % ckpt.save_steps == 0


class Training:
    """One training stage over started ranks: steps, validation, checkpoints, selection."""

    def __init__(
        self, config: Config, inputs: TrainingInputs, *, ranks: Any, engines: Sequence[Any], log: MetricsLog
    ) -> None:
        self._config, self._inputs, self._ranks, self._engines, self._log = config, inputs, ranks, engines, log
        self._total, self._per_epoch = inputs.schedule.total, inputs.schedule.per_epoch
        self._best: Selection | None = None
        self._snapshots = Snapshots(checkpoint_folder(config), checkpointed=saves_checkpoints(config))

    def run(self, start_step: int, best: dict[str, Any] | None) -> Selection | None:
        """Steps start_step + 1 to the last; returns the selected student, or None if nothing validated it."""
        self._best = Selection(**best) if best else None
        title = f"train {self._config.algo.distill.name}"
        with stage_progress(title, self._total, "steps") as progress:
            progress.start_at(start_step)
            watch = Stopwatch()
            for step in range(start_step + 1, self._total + 1):
                metrics = self._train_step(step)
                metrics |= wall_clock_rates(metrics, watch.lap())
                if step % self._config.logger.logging_steps == 0:
                    self._log.train(step, step / self._per_epoch, metrics)
                if self._is_validation_step(step):
                    with watch.paused(), driver_span("validate", step=step):
                        self._validate(step)
                if self._is_checkpoint_step(step):
                    with driver_span("checkpoint", step=step):
                        self._save_checkpoint(step)
                progress.advance(note=f"loss {metrics['loss']:.4f}")
        return self._best

    def _train_step(self, step: int) -> dict[str, float]:
        """One optimizer step: its metrics."""
        with driver_span("train", step=step):
            return dict(self._on_ranks("train_step", step, what=f"training step {step}")[0])

    def _give_engines(self, step: int, folder: Path) -> None:
        """Give the validation engines the student of a step, which is saved in a folder."""
        wait_for(
            [engine.load.remote(str(folder)) for engine in self._engines],
            timeout_s=self._config.cluster.start_timeout_s,
            what="the validation engines to load the student",
        )

    def _on_ranks(self, method: str, *arguments: Any, what: str, **keywords: Any) -> list[Any]:
        refs = self._ranks.async_run_method(method, *arguments, **keywords)
        return wait_for(refs, timeout_s=self._config.cluster.step_timeout_s, what=what)

    def _is_validation_step(self, step: int) -> bool:
        every = self._config.eval.steps if self._config.eval.steps > 0 else self._per_epoch
        return bool(self._inputs.validation) and (step % every == 0 or step == self._total)

    def _is_checkpoint_step(self, step: int) -> bool:
        return is_checkpoint_step(self._config, step)

    def _validate(self, step: int) -> None:
        tag = f"best_global_step{step}"
        folder = self._snapshots.path(tag)
        values = self._loss_of_references(step) if self._inputs.stores.validation is not None else {}
        if self._engines:
            # They may load the student from its folder.
            self._save_student(step, folder)
            values |= self._scores_of_samples(step, folder)
        self._log.validation(step, step / self._per_epoch, values)
        metric = selection_metric(self._config)
        found = Selection(metric, values[metric], step, tag)
        if not found.is_better_than(self._best):
            self._snapshots.remove(tag)
            return
        if not self._engines:
            self._save_student(step, folder)
        worse, self._best = self._best, found
        if worse is not None:
            self._snapshots.supersede(worse.tag)

    def _save_student(self, step: int, folder: Path) -> None:
        self._on_ranks("save_hf", str(folder), what=f"the student of step {step} to be saved")

    def _loss_of_references(self, step: int) -> dict[str, float]:
        """The loss of the validation set's own responses, by the ranks."""
        return {LOSS: self._on_ranks("validation_loss", what=f"the validation loss of step {step}")[0]}

    def _scores_of_samples(self, step: int, folder: Path) -> dict[str, float]:
        """Scores of responses that the engines sample from the student of a step."""
        self._give_engines(step, folder)
        return validate(
            self._engines,
            self._inputs.validation,
            config=self._config,
            tokenizer=self._inputs.tokenizer,
            checker=self._inputs.checker,
        )

    def _save_checkpoint(self, step: int) -> None:
        best = asdict(self._best) if self._best else None
        self._on_ranks(
            "save_checkpoint",
            f"global_step{step}",
            {"step": step, "best": best, "run": RunFolder.started_s(Path(self._config.ckpt.output_dir))},
            what=f"the checkpoint of step {step}",
        )
        self._snapshots.prune()


@contextmanager
def rank_places(config: Config) -> Iterator[PlacementGroup]:
    """Room for the student's ranks: bundle i has rank i, and the GPU that others may share with it."""
    world = config.actor.num_nodes * config.actor.num_gpus_per_node
    bundles = [{"CPU": 1.0, "GPU": 1.0}] * world
    with placed(bundles, timeout_s=config.cluster.start_timeout_s, what="the student's ranks") as group:
        yield group


@contextmanager
def started_ranks(
    config: Config, inputs: TrainingInputs, places: PlacementGroup, *, gpu_share: float = 1.0
) -> Iterator[Any]:
    """The student's DeepSpeed ranks, with model, optimizer and data ready.

    Args:
        config: the job.
        inputs: of the stage.
        places: of `rank_places`.
        gpu_share: of its GPU that a rank takes in Ray's books.
    """
    import ray

    from openrlhf_bd.student.actor import StudentRank
    from openrlhf_bd.student.strategy import make_strategy
    from openrlhf_bd.upstream import RayActorGroup

    actor, timeout_s = config.actor, config.cluster.start_timeout_s
    world = actor.num_nodes * actor.num_gpus_per_node
    console.print(f"[dim]starting the student's ranks: {world}[/dim]", highlight=False)
    ranks = RayActorGroup(
        actor.num_nodes, actor.num_gpus_per_node, StudentRank, pg=places, num_gpus_per_actor=gpu_share
    )
    try:
        refs = ranks.async_init_model_from_pretrained(
            make_strategy(config),
            config,
            stores=inputs.stores,
            pretrain_path=str(inputs.pretrain_path) if inputs.pretrain_path else None,
            max_steps=inputs.schedule.total,
            stop_ids=list(inputs.stop_ids),
        )
        with driver_span("start"):
            wait_for(refs, timeout_s=timeout_s, what="the student's ranks to load the model")
        # They do the same at the same time: one of them speaks for all.
        with collected(lambda: {RANKS: ranks._actor_handlers[0].take_spans}):
            yield ranks
    finally:
        for actor in ranks._actor_handlers:
            ray.kill(actor)


def train_student(config: Config, inputs: TrainingInputs) -> dict[str, Any]:
    """Train on finished rows, and leave the selected student at the top of the run folder.

    Returns:
        What the run's record keeps: steps and the selection.
    """
    first = str(config.actor.model_name_or_path)
    validation: AbstractContextManager[list[Any]] = (
        student_engines(config, model=first) if validates_by_sampling(config) else nullcontext([])
    )
    with rank_places(config) as places, started_ranks(config, inputs, places) as ranks, validation as engines:

        def train(start_step: int, best: dict[str, Any] | None, log: MetricsLog) -> Selection | None:
            return Training(config, inputs, ranks=ranks, engines=engines, log=log).run(start_step, best)

        return finish_training(config, inputs, ranks, train)


def finish_training(
    config: Config,
    inputs: TrainingInputs,
    ranks: Any,
    train: Callable[[int, dict[str, Any] | None, MetricsLog], Selection | None],
) -> dict[str, Any]:
    """Resume started ranks from the newest checkpoint, train, and put the selected student at the top of the folder.

    Args:
        config: the job.
        inputs: of the stage.
        ranks: the student's.
        train: trains from a step on, given the best student so far, and returns the selected one.

    Returns:
        What the run's record keeps: steps and the selection.
    """
    folder, total = Path(config.ckpt.output_dir), inputs.schedule.total
    timeout_s = config.cluster.start_timeout_s
    tag = newest_tag(checkpoint_folder(config) / ACTOR_FOLDER)
    states = wait_for(
        ranks.async_run_method("load_checkpoint", tag), timeout_s=timeout_s, what=f"checkpoint {tag} to load"
    )[0]
    start_step = states.get("step", 0)
    check_start(start_step, total, tag=tag, config=config)
    # Another run (--ckpt.load_enable) chose by its own validation, and the folder of its student is its own.
    best_so_far = states["best"] if states.get("run") == RunFolder.started_s(folder) else None
    truncate_metrics(folder / METRICS_FILE, after_step=start_step)
    log = MetricsLog(config, folder)
    try:
        best = train(start_step, best_so_far, log)
    finally:
        log.close()
    if best is None:
        with driver_span("checkpoint"):
            wait_for(
                ranks.async_run_method("save_hf", str(selected_folder(config, None))),
                timeout_s=timeout_s,
                what="the student to be saved",
            )
    _copy_to_top(selected_folder(config, best.tag if best else None), folder)
    return {
        "steps": total,
        "selected_step": best.step if best else total,
        "selection": asdict(best) if best else None,
    }


def selected_folder(config: Config, tag: str | None) -> Path:
    """Where the selected student is until the run's record says that training has finished; None: the last student."""
    if tag is None:
        return Path(config.ckpt.output_dir) / "final_hf"
    return checkpoint_folder(config) / f"{tag}{SNAPSHOT_SUFFIX}"


def _copy_to_top(source: Path, folder: Path) -> None:
    """Put a Hugging Face model folder's files at the top of the run folder, the weights last."""
    for entry in sorted(source.iterdir(), key=lambda entry: entry.suffix == ".safetensors"):
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name, dirs_exist_ok=True)
        else:
            shutil.copy2(entry, folder / entry.name)
