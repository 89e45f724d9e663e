"""The student's ranks: Ray actors that each hold one DeepSpeed rank, read their own rows and train step by step."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import ray
import torch

from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.config import Config
from openrlhf_bd.engines.arguments import Transfer
from openrlhf_bd.engines.spans import SpanLog
from openrlhf_bd.records import Span
from openrlhf_bd.student.average import EMA, TARGET, average_file, make_averages, save_averages
from openrlhf_bd.student.checkpoints import newest_tag, remove_old_students
from openrlhf_bd.student.data import StudentData
from openrlhf_bd.student.export import save_hf
from openrlhf_bd.student.flops import count_model, peak_tflops
from openrlhf_bd.student.live_teacher import LiveTeacher, load_live_teacher
from openrlhf_bd.student.loading import load_student
from openrlhf_bd.student.lora import save_adapter
from openrlhf_bd.student.model import context_length, vocabulary_size
from openrlhf_bd.student.row_source import RowStores
from openrlhf_bd.student.step import StudentStep, TrainedModel, Utilisation
from openrlhf_bd.student.strategy import PARAM_DTYPES, BellmanStrategy, checkpoint_folder
from openrlhf_bd.student.weights import WeightSender, trained_weights
from openrlhf_bd.upstream import BaseModelActor

OWN_STATE = "openrlhf_bd"
ACTOR_FOLDER = "_actor"
# Of a training step, as its metrics name them.
STEP_PARTS = ("data", "forward_backward", "optimizer")


def student_environment() -> dict[str, str]:
    """Environment of a rank's process: ranks of one machine must not each start a thread per core."""
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }


class StudentRankImpl(BaseModelActor):
    """One rank of the student. Every method is collective: call it on all ranks with the same arguments."""

    def init_model_from_pretrained(
        self,
        strategy: BellmanStrategy,
        config: Config,
        *,
        stores: RowStores,
        pretrain_path: str | None,
        max_steps: int,
        stop_ids: Sequence[int],
    ) -> None:
        """Join the other ranks, load the student, and open the data.

        Args:
            strategy: see strategy.make_strategy.
            config: options of the job.
            stores: of the rows.
            pretrain_path: pre-training blocks, .npy [blocks, length], or None.
            max_steps: optimizer steps of the whole stage, for the learning rate schedule.
            stop_ids: tokens that end a response.

        Raises:
            ConfigError: options that don't fit each other, the model or the store.
            DataError: the model cannot be loaded, or rows are too long for it.
            StoreError: the store is damaged or unfinished.
        """
        self._spans, started = SpanLog(), time.time()
        self._setup_distributed(strategy)
        self._config = config
        self._stop_ids = tuple(stop_ids)
        self._algorithm_class = resolve_algorithm(config.algo.distill.name)
        self._needs = self._algorithm_class.needs_of(config.algo.distill)
        self._shift_constant: float | None = None
        student = load_student(config, strategy)
        self._data = StudentData(
            config,
            stores=stores,
            pretrain_path=pretrain_path,
            needs=self._needs,
            stop_ids=stop_ids,
            rank=strategy.get_rank(),
            num_ranks=strategy.world_size,
            context_length=context_length(student),
            vocab_size=vocabulary_size(student),
        )
        self._student = TrainedModel(*strategy.prepare((student, self._training_options(max_steps))))
        self._averages = make_averages(self._student.engine, config, self._needs)
        self._step = StudentStep(
            self._student,
            strategy,
            config,
            utilisation=self._utilisation(),
            teacher=self._live_teacher(),
            target=self._averages.get(TARGET),
        )
        self._spans.add("start", started, time.time())

    def take_spans(self, *, everything: bool = False) -> tuple[float, list[Span]]:
        """What the rank did since the last call, and its clock; see `SpanLog.take`. Not collective."""
        return self._spans.take(everything=everything)

    def _utilisation(self) -> Utilisation:
        dtype, given = PARAM_DTYPES[self._config.ds.param_dtype], self._config.logger.peak_tflops
        peak = peak_tflops(self.strategy.device, dtype, given=given)
        counts = count_model(self._student.engine.module.model)
        return Utilisation(counts, float(self.strategy.all_reduce(peak, "sum")))

    def _live_teacher(self) -> LiveTeacher | None:
        if self._config.algo.distill.kd_ratio == 0 and not self._needs.live_teacher:
            return None
        vocab_size = vocabulary_size(self._student.engine.module)
        return load_live_teacher(self._config, vocab_size=vocab_size, device=self.strategy.device)

    def _training_options(self, max_steps: int) -> dict[str, Any]:
        """Optimizer and schedule as upstream's `prepare` takes them."""
        actor = self._config.actor
        return {
            "optim": actor.optim,
            "adam": actor.adam.model_dump(),
            "muon": actor.muon.model_dump(),
            "lr_scheduler": actor.lr_scheduler,
            "lr_warmup_ratio": actor.lr_warmup_ratio,
            "min_lr_ratio": actor.min_lr_ratio,
            "max_norm": actor.max_norm,
            "scheduler_steps": max_steps,
        }

    def estimate_shift(self, num_batches: int) -> float:
        """Constant shift of Q: mean log-sum-exp of the student as it is now, over the first global batches' responses.

        Kept in checkpoints. `train_step` calls it where the algorithm needs a shift that was neither estimated nor
        loaded.

        Args:
            num_batches: global batches to look at.

        Returns:
            Nats.
        """
        batches = (self._data.step(step) for step in range(1, num_batches + 1))
        self._shift_constant = self._step.mean_logsumexp(batches)
        return self._shift_constant

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step on the global batch of that step.

        Args:
            step: counted from 1.

        Returns:
            Metrics over all ranks: `loss`, `policy_loss`, `ptx_loss`, `actor_lr`, `actor_grad_norm`, the algorithm's
            own, and `time_*_s`, which are means over ranks.

        Raises:
            TrainingError: a loss or gradient is not finite; on all ranks, before any weight changes.
        """
        began_s = time.time()
        if self._needs.shift_constant and self._shift_constant is None:
            self.estimate_shift(self._data.shift_steps)
        started = time.monotonic()
        batch = self._data.step(step)
        data_s = time.monotonic() - started
        if self._config.ds.lora.dropout > 0:
            # What dropout leaves out depends on the step and the rank alone, so a resumed run repeats it.
            torch.manual_seed((self._config.train.seed * 2**16 + step) * 2**10 + self.strategy.get_rank())
        algorithm = self._algorithm_class(self._config.algo.distill, self._stop_ids, self._shift_constant)
        metrics = self._step.run(step, batch, algorithm, data_s=data_s)
        for average in self._averages.values():
            average.update()
        parts = {name: metrics[f"time_{name}_s"] for name in STEP_PARTS}
        self._spans.add("train", began_s, time.time(), step=step, parts=parts)
        return metrics

    def validation_loss(self) -> float:
        """Mean negative log-likelihood of the validation set's own responses, nats a token, over all ranks.

        Of the running average with --train.enable_ema. Training goes on as if it had not been computed.
        """
        with self._spans.span("validate"), self._selected_weights():
            return self._step.mean_nll(chain.from_iterable(self._data.validation()))

    def save_checkpoint(
        self,
        tag: str,
        client_states: dict[str, Any] | None = None,
        metric_value: float | None = None,
        metric_key: str | None = None,
    ) -> None:
        """Save what a resumed run needs, and the student itself with --ckpt.save_hf.

        Args:
            tag: name of the checkpoint, as global_step100.
            client_states: what `load_checkpoint` gives back.
            metric_value: validation value, higher is better, or None.
            metric_key: its name.

        Raises:
            OSError: it cannot be written.
        """
        ckpt = self._config.ckpt
        folder = checkpoint_folder(self._config)
        if not ckpt.disable_ds:
            averages = {name: average.whole() for name, average in self._averages.items()}
            with self._spans.span("checkpoint"):
                self.strategy.save_ckpt(
                    self._student.engine,
                    str(folder / ACTOR_FOLDER),
                    tag,
                    ckpt.max_num,
                    ckpt.max_mem,
                    {OWN_STATE: {"client": client_states or {}, "shift_constant": self._shift_constant}},
                    metric_value=metric_value,
                    metric_key=metric_key,
                    write_more=lambda path: save_averages(averages, path),
                )
        if ckpt.save_hf:
            newest = f"{tag}_hf"
            self.save_hf(str(folder / newest))
            self.strategy.on_rank_0(lambda: remove_old_students(folder, newest=newest, max_num=ckpt.max_num))

    def load_checkpoint(self, tag: str | None = None) -> dict[str, Any]:
        """Go on from a checkpoint.

        Args:
            tag: which one; None: with --ckpt.load_enable the newest whole one, if there is one.

        Returns:
            The client states that were saved; empty if nothing was loaded.

        Raises:
            StoreError: the checkpoint is missing or damaged.
            ConfigError: it was written by other ranks.
        """
        folder = checkpoint_folder(self._config) / ACTOR_FOLDER
        if tag is None and self._config.ckpt.load_enable:
            tag = newest_tag(folder)
        if tag is None:
            return {}
        _, states = self.strategy.load_ckpt(self._student.engine, str(folder), tag)
        for name, average in self._averages.items():
            average.load(folder / tag / average_file(name))
        own = states[OWN_STATE]
        self._shift_constant = own["shift_constant"]
        return dict(own["client"])

    def save_hf(self, path: str) -> None:
        """Save the student as a Hugging Face folder, whole or not at all; an older folder there is replaced.

        With --train.enable_ema it is the running average that is saved.

        Raises:
            OSError: it cannot be written.
        """
        with self._spans.span("checkpoint"), self._selected_weights():
            save_hf(self._student.engine, self.strategy, Path(path), self._config)

    def _selected_weights(self) -> AbstractContextManager[None]:
        """Inside, the student's parameters are those that are validated and saved."""
        ema = self._averages.get(EMA)
        return ema.applied() if ema is not None else nullcontext()

    def join_weight_group(self, engines: Sequence[Any], *, transfer: Transfer, workers_per_engine: int) -> None:
        """Form a group with engines that sample from the student; it takes the place of an earlier one.

        Args:
            engines: actor handles of `RolloutEngine`.
            transfer: how weights travel.
            workers_per_engine: of vLLM.

        Raises:
            ConfigError: an engine hosts another architecture.
            ClusterError: the group did not come together in time.
        """
        self._weight_sender = WeightSender(
            self._student.engine,
            self.strategy,
            engines,
            transfer=transfer,
            address=self._get_current_node_ip(),
            workers_per_engine=workers_per_engine,
            timeout_s=self._config.cluster.sync_timeout_s,
        )

    def send_weights(self, *, average: bool = False) -> dict[str, float]:
        """Send the student to the engines of the group.

        Args:
            average: its running average (--train.enable_ema) instead.

        Returns:
            Seconds and bytes, see `WeightSender.send`.

        Raises:
            ClusterError: an engine did not get or load the weights; on rank 0.
        """
        with self._spans.span("sync"), self._averages[EMA].applied() if average else nullcontext():
            return self._weight_sender.send()

    def save_adapter(self, path: str, *, average: bool = False) -> int:
        """Save the adapters alone as peft does, for engines that hold the frozen model (--ds.lora.rank).

        Args:
            path: folder to make.
            average: their running average (--train.enable_ema) instead.

        Returns:
            Bytes of the adapters; 0 on other ranks than 0.

        Raises:
            OSError: it cannot be written; on all ranks.
        """
        engine = self._student.engine
        with self._spans.span("sync"):
            with self._averages[EMA].applied() if average else nullcontext():
                weights = trained_weights(engine)
            self.strategy.on_rank_0(lambda: save_adapter(engine.module.model, weights, self._config, Path(path)))
        return sum(tensor.nbytes for tensor in weights.values())


# Options that RayActorGroup gives each actor are added to these.
StudentRank = ray.remote(
    num_gpus=1, max_restarts=0, max_task_retries=0, runtime_env={"env_vars": student_environment()}
)(StudentRankImpl)
