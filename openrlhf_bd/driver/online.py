"""The online stage: rows are made while the student trains, and engines that sample from it get its new weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from openrlhf_bd.config import Config
from openrlhf_bd.driver.cluster import cluster_device
from openrlhf_bd.driver.engines import (
    GPU_SHARE,
    EngineActors,
    engine_sync,
    rollout_engines,
    student_engines,
    teacher_engines,
)
from openrlhf_bd.driver.metrics import MetricsLog
from openrlhf_bd.driver.producer import Producer
from openrlhf_bd.driver.run_folder import CONFIG_FILE
from openrlhf_bd.driver.selection import Selection, validates_by_sampling
from openrlhf_bd.driver.timeline import driver_span
from openrlhf_bd.driver.training import Training, TrainingInputs, finish_training, rank_places, started_ranks
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.errors import ClusterError
from openrlhf_bd.records import Prompt
from openrlhf_bd.rollout.calls import wait_for
from openrlhf_bd.rollout.plan import RowPlan
from openrlhf_bd.rollout.weights import EngineSync
from openrlhf_bd.store import StoreManifest, StoreWriter


@dataclass(frozen=True, slots=True)
class OnlineInputs:
    """What the online stage makes rows from.

    Attributes:
        prompts: prompts of the run.
        plan: rows of every step.
        path: of the store.
        manifest: what its rows are.
        teacher: folder or hub name of the teacher.
    """

    prompts: Sequence[Prompt]
    plan: RowPlan
    path: Path
    manifest: StoreManifest
    teacher: str


class OnlineTraining(Training):
    """Training beside a producer of rows.

    Args:
        config: the job.
        inputs: of the stage.
        plan: rows of every step.
        ranks: the student's.
        engines: for validation; the student's rollout engines, where there are any.
        log: of the metrics.
        producer: makes the rows.
        students: the student's rollout engines; None: no row needs them.
        sync: gives them its weights.
        trained: optimizer steps done; the engines have these weights.
    """

    def __init__(
        self,
        config: Config,
        inputs: TrainingInputs,
        plan: RowPlan,
        *,
        ranks: Any,
        engines: Sequence[Any],
        log: MetricsLog,
        producer: Producer,
        students: EngineActors | None,
        sync: EngineSync | None,
        trained: int,
    ) -> None:
        super().__init__(config, inputs, ranks=ranks, engines=engines, log=log)
        self._plan, self._producer, self._trained = plan, producer, trained
        self._students, self._sync = students, sync
        self._version = trained
        self._is_colocated = config.train.colocate_all
        # On CPUs there is no memory of a device to give back; engines only rest.
        self._sleeps = self._is_colocated and cluster_device() == "cuda"

    def _train_step(self, step: int) -> dict[str, float]:
        if step >= self._plan.first_step:
            with driver_span("wait", step=step):
                self._producer.wait_for_rows(step, on_idle=self._give_new_engines_weights)
        with self._engines_off_gpus(), driver_span("train", step=step):
            refs = self._ranks.async_run_method("train_step", step)
            what = f"training step {step}"
            self._produce_beside(refs, what=what)
            metrics = dict(wait_for(refs, timeout_s=self._config.cluster.step_timeout_s, what=what)[0])
        self._trained = step
        self._producer.trained(step)
        if self._is_sync_step(step):
            with driver_span("sync", step=step):
                metrics |= self._give_weights(step)
        elif self._sleeps:
            self._on_students("wake_up")
        return {**metrics, **self._producer.lap(step)}

    @contextmanager
    def _engines_off_gpus(self) -> Iterator[None]:
        """Inside, engines that share the ranks' GPUs do nothing there; afterwards they have room for weights again."""
        if not self._is_colocated:
            yield
            return
        with self._producer.students_resting():
            if self._sleeps:
                self._on_students("sleep")
            yield
            if self._sleeps:
                self._on_students("wake_up", "weights")

    def _on_students(self, method: str, *arguments: Any) -> None:
        assert self._students is not None
        refs = [getattr(engine, method).remote(*arguments) for engine in self._students.handles]
        timeout_s = self._config.cluster.sync_timeout_s
        wait_for(refs, timeout_s=timeout_s, what=f"the student's engines: {method.replace('_', ' ')}")

    def _produce_beside(self, refs: Sequence[Any], *, what: str) -> None:
        """Make rows until the ranks are done.

        Raises:
            ClusterError: one of them failed, or they are over their time.
        """
        limit_s = self._config.cluster.step_timeout_s
        deadline = time.monotonic() + limit_s
        running = list(refs)
        while running:
            if (left_s := deadline - time.monotonic()) <= 0:
                raise ClusterError(
                    f"no answer within {limit_s:.0f} s (--cluster.step_timeout_s) while waiting for {what}. Run the "
                    "same command again to resume"
                )
            self._producer.advance(timeout_s=min(1.0, left_s), beside=running)
            done, running = ray.wait(running, num_returns=len(running), timeout=0)
            # A rank that failed says so at once; the others would wait for it.
            wait_for(done, timeout_s=left_s, what=what)

    def _is_sync_step(self, step: int) -> bool:
        distill = self._config.algo.distill
        # Before the online steps weights are of use from where rows of the first one may begin.
        wanted = step >= self._plan.first_step - 1 - distill.max_staleness and step < self._total
        return self._sync is not None and wanted and (step - self._plan.first_step + 1) % distill.sync_steps == 0

    def _give_weights(self, version: int, *, average: bool = False) -> dict[str, float]:
        """Bring the student's weights, or their average, to its engines; those that died meanwhile are replaced."""
        while True:
            self._producer.wait_for_students()
            try:
                self._join_new_engines()
                assert self._sync is not None
                metrics = self._sync.sync(version, average=average)
            except ClusterError:
                if not self._producer.replace_dead_students():
                    raise
                continue
            self._producer.has_weights(version)
            self._version = version
            return metrics

    def _give_new_engines_weights(self) -> None:
        if self._producer.needs_weights:
            self._give_weights(self._trained)

    def _join_new_engines(self) -> None:
        """Form the group of ranks and engines anew, where an engine took another's place."""
        if self._producer.needs_weights:
            assert self._students is not None
            self._sync = engine_sync(self._config, self._ranks, self._students, shared=self._is_colocated)

    def _validate(self, step: int) -> None:
        if self._sync is None or not self._engines:
            super()._validate(step)
        elif not self._config.train.enable_ema:
            if self._version != step:
                self._give_weights(step)
            super()._validate(step)
        else:
            # The average is for validation alone: no row may come from it.
            with self._producer.students_resting():
                self._give_weights(step, average=True)
                super()._validate(step)
                self._give_weights(step)

    def _loss_of_references(self, step: int) -> dict[str, float]:
        with self._engines_off_gpus():
            found = super()._loss_of_references(step)
        if self._sleeps:
            self._on_students("wake_up")
        return found

    def _give_engines(self, step: int, folder: Path) -> None:
        if self._sync is None:
            super()._give_engines(step, folder)


def train_online(config: Config, inputs: TrainingInputs, online: OnlineInputs) -> dict[str, Any]:
    """Make rows and train on them side by side, and leave the selected student at the top of the run folder.

    Returns:
        What the run's record keeps: steps and the selection.

    Raises:
        ClusterError: an actor died or hung, and no other could take its place. Sealed rows and checkpoints are safe.
        StoreError: rows could not be written.
    """
    first = str(config.actor.model_name_or_path)
    samples = online.plan.student_fraction(online.plan.last_step) > 0
    manifest = online.manifest
    record = RecordOptions(manifest.top_p, manifest.always_include, logprobs=manifest.has_logprobs)
    with ExitStack() as stack:
        writer = stack.enter_context(_writer(config, online))
        places = stack.enter_context(rank_places(config))
        shared = places if config.train.colocate_all else None
        gpu_share = 1.0 if shared is None else 1.0 - GPU_SHARE
        ranks = stack.enter_context(started_ranks(config, inputs, places, gpu_share=gpu_share))
        teachers = stack.enter_context(
            teacher_engines(config, model=online.teacher, record=record, num_engines=config.teacher.num_engines)
        )
        students = stack.enter_context(rollout_engines(config, model=first, shared=shared)) if samples else None
        engines: Sequence[Any] = ()
        if validates_by_sampling(config):
            engines = students.handles if students else stack.enter_context(student_engines(config, model=first))

        def train(start_step: int, best: dict[str, Any] | None, log: MetricsLog) -> Selection | None:
            sync = None if students is None else engine_sync(config, ranks, students, shared=shared is not None)
            if sync is not None:
                with driver_span("sync"):
                    sync.sync(start_step)
            producer = Producer(
                config, online.prompts, online.plan, writer, teachers=teachers, students=students, trained=start_step
            )
            training = OnlineTraining(
                config,
                inputs,
                online.plan,
                ranks=ranks,
                engines=engines,
                log=log,
                producer=producer,
                students=students,
                sync=sync,
                trained=start_step,
            )
            return training.run(start_step, best)

        return finish_training(config, inputs, ranks, train)


def _writer(config: Config, online: OnlineInputs) -> StoreWriter:
    # Rows of a step are one shard: they appear to the ranks together, and a resumed run finds all or none of them.
    writer = StoreWriter(online.path, online.manifest, rows_per_shard=config.train.batch_size)
    writer.keep_job((Path(config.ckpt.output_dir) / CONFIG_FILE).read_text(encoding="utf-8"))
    return writer
