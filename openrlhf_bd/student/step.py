"""One optimizer step of a rank: gradients of its micro-batches, a check that all is finite, the step, exact metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from openrlhf_bd.algorithms.base import Algorithm, StepContext
from openrlhf_bd.config import Config
from openrlhf_bd.data.micro_batches import MicroBatch, TokenBatch
from openrlhf_bd.errors import TrainingError
from openrlhf_bd.functional.bellman import td_scale_at
from openrlhf_bd.functional.cross_entropy import sum_of_nll
from openrlhf_bd.functional.head import StudentHead, mean_log_sum_exp
from openrlhf_bd.functional.metrics import Metrics, mean_metrics, merge_metrics
from openrlhf_bd.functional.trajectories import Trajectories
from openrlhf_bd.student.data import StepBatch
from openrlhf_bd.student.flops import TERA, ModelCounts, step_flops
from openrlhf_bd.student.live_teacher import LiveTeacher
from openrlhf_bd.student.loss import MicroBatchLoss, rollout_tokens, text_tokens
from openrlhf_bd.student.strategy import BellmanStrategy

MAX_NAMES = 8

# Sum and count of something over the states of a head.
Measure = Callable[[StudentHead], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """What `strategy.prepare` returned.

    Attributes:
        engine: DeepSpeed engine around the student.
        optimizer: its optimizer.
        scheduler: its learning rate schedule.
    """

    engine: Any
    optimizer: Any
    scheduler: Any


@dataclass(frozen=True, slots=True)
class Utilisation:
    """What model FLOP utilisation is measured against.

    Attributes:
        counts: of the student.
        peak_tflops: of all ranks' devices together.
    """

    counts: ModelCounts
    peak_tflops: float


class TargetNetwork(Protocol):
    """Slowly moving weights of the student (average.ParameterAverage)."""

    def applied(self) -> AbstractContextManager[None]:
        """Inside, the engine's parameters are the target network's."""


@dataclass(frozen=True, slots=True)
class _Work:
    """A step's micro-batches and what their losses share."""

    step: int
    batch: StepBatch
    algorithm: Algorithm
    target_heads: Sequence[StudentHead | None]


class StudentStep:
    """Computes steps of one rank.

    Args:
        student: engine, optimizer and schedule.
        strategy: of this rank.
        config: options of the job.
        utilisation: for the model FLOP utilisation.
        teacher: for --algo.distill.kd_ratio and algorithms that need it live, or None.
        target: for --algo.distill.next_value_gradient target, or None.
    """

    def __init__(
        self,
        student: TrainedModel,
        strategy: BellmanStrategy,
        config: Config,
        *,
        utilisation: Utilisation,
        teacher: LiveTeacher | None = None,
        target: TargetNetwork | None = None,
    ) -> None:
        self._student, self._strategy, self._config = student, strategy, config
        self._options = config.algo.distill
        self._utilisation, self._teacher, self._target = utilisation, teacher, target

    def run(self, step: int, batch: StepBatch, algorithm: Algorithm, *, data_s: float) -> dict[str, float]:
        """One optimizer step. Collective.

        Args:
            step: counted from 1.
            batch: this rank's micro-batches.
            algorithm: whose loss is minimised.
            data_s: seconds that reading the batch took.

        Returns:
            Metrics over all ranks, the same on each.

        Raises:
            TrainingError: a loss or gradient is not finite; on all ranks, before any weight changes.
        """
        started = time.monotonic()
        work = _Work(step, batch, algorithm, self._target_heads(batch))
        metrics, not_finite = self._gradients(work)
        self._require_finite(work, not_finite)
        gradients_done = time.monotonic()
        learning_rate = float(self._student.scheduler.get_last_lr()[0])
        engine = self._student.engine
        norm = self._strategy.optimizer_step(self._student.optimizer, engine, self._student.scheduler)
        metrics["time_data_s"] = self._pair(data_s)
        metrics["time_forward_backward_s"] = self._pair(gradients_done - started)
        metrics["time_optimizer_s"] = self._pair(time.monotonic() - gradients_done)
        values = self._reduced(metrics)
        return {
            "loss": values["policy_loss"] + self._options.pretrain_coef * values.get("ptx_loss", 0.0),
            **values,
            "actor_lr": learning_rate,
            "actor_grad_norm": norm,
            "response_length": batch.num_tokens / batch.num_rows,
            "total_length": (batch.num_tokens + batch.num_prompt_tokens) / batch.num_rows,
            **self._warm_up(step),
            **_use_of(batch),
            **self._speed(batch, values["time_forward_backward_s"] + values["time_optimizer_s"]),
        }

    def mean_logsumexp(self, batches: Iterable[StepBatch]) -> float:
        """Mean log-sum-exp of the student's logits / tau over the response tokens of global batches. Collective."""

        def level(trajectories: Trajectories) -> Measure:
            return partial(mean_log_sum_exp, mask_S=trajectories.has_action_S, tau=self._options.tau)

        return self._mean(chain.from_iterable(batch.micro_batches for batch in batches), level)

    def mean_nll(self, micro_batches: Iterable[MicroBatch]) -> float:
        """Mean negative log-likelihood of a response token over all ranks' rows, nats, in fp32. Collective.

        No dropout, no gradient, no random number: the next training step is what it would have been without.
        """

        def nll(trajectories: Trajectories) -> Measure:
            return partial(sum_of_nll, target_S=trajectories.taken_S, mask_S=trajectories.has_action_S)

        return self._mean(micro_batches, nll)

    @torch.no_grad()
    def _mean(self, micro_batches: Iterable[MicroBatch], measure: Callable[[Trajectories], Measure]) -> float:
        """Sum by count of what is measured at the rollouts' states, over micro-batches and ranks."""
        engine, device = self._student.engine, self._strategy.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        was_training = engine.module.training
        engine.eval()
        for micro_batch in micro_batches:
            of_states = measure(micro_batch.trajectories.to(device))
            sums += micro_batch.weight * torch.stack(self._forward(rollout_tokens(micro_batch), of_states))
        engine.train(was_training)
        total, count = self._strategy.all_reduce(sums, "sum").tolist()
        return float(total / count)

    def _forward(self, tokens: TokenBatch, loss: Callable[[StudentHead], Any] | None) -> Any:
        tokens = tokens.to(self._strategy.device)
        return self._student.engine(
            tokens.input_ids, tokens.position_ids, tokens.attention_mask, tokens.state_index_S, loss
        )

    def _target_heads(self, batch: StepBatch) -> list[StudentHead | None]:
        """The target network at the rollouts' states of each micro-batch: all at once, for one change of weights.

        The heads share one copy of the output embedding. Every rank passes each micro-batch through the model, since
        under ZeRO-3 ranks meet there.
        """
        micro_batches = batch.micro_batches
        if self._target is None:
            return [None] * len(micro_batches)
        with self._target.applied():
            hidden = [self._forward(rollout_tokens(micro_batch), None) for micro_batch in micro_batches]
            head = self._student.engine.module.head(torch.cat(hidden))
        starts = np.cumsum([0, *(micro_batch.num_states for micro_batch in micro_batches)]).tolist()
        return [
            head.narrow(start, micro_batch.num_states)
            for start, micro_batch in zip(starts, micro_batches, strict=False)
        ]

    def _gradients(self, work: _Work) -> tuple[Metrics, list[Tensor]]:
        """Gradients of the whole step; metrics of this rank; whether the loss of each micro-batch is not finite."""
        self._student.engine.train()
        micro_batches = work.batch.micro_batches
        metrics: Metrics = {}
        sums: dict[str, Tensor | float] = {}
        not_finite = []
        for index, micro_batch in enumerate(micro_batches):
            loss, parts, own_metrics = self._forward(micro_batch.tokens, self._loss(work, index))
            # DeepSpeed averages gradients over ranks; the loss is a sum over them.
            scale = micro_batch.weight * self._strategy.world_size
            self._strategy.backward(loss * scale, self._student.engine, last=index == len(micro_batches) - 1)
            not_finite.append(~torch.isfinite(loss.detach()))
            for name, part in parts.items():
                sums[name] = sums.get(name, 0.0) + part.double() * micro_batch.weight
            counted = {
                name: (total * micro_batch.weight, weight * micro_batch.weight)
                for name, (total, weight) in own_metrics.items()
            }
            metrics = merge_metrics([metrics, counted])
        # What counts is the sum over ranks, so only one rank gives a weight. A rank may have no text.
        weight = float(self._strategy.is_rank_0())
        names = ["policy_loss", *(["ptx_loss"] if work.batch.num_targets else [])]
        losses = {name: self._pair(float(sums.get(name, 0.0)), weight=weight) for name in names}
        return metrics | losses, not_finite

    def _loss(self, work: _Work, index: int) -> MicroBatchLoss:
        micro_batch, batch = work.batch.micro_batches[index], work.batch
        every = self._config.logger.diagnostics_steps
        context = StepContext(
            num_tokens=float(batch.num_tokens),
            num_rows=float(batch.num_rows),
            step=work.step,
            target_head=work.target_heads[index],
            teacher_head=self._teacher_head(micro_batch) if work.algorithm.needs.live_teacher else None,
            generator=self._generator(work.step, index),
            full_diagnostics=work.step == 1 or work.step % every == 0,
        )
        teacher_head = None
        if self._options.kd_ratio > 0 and micro_batch.num_targets:
            teacher_head = self._teacher_on(text_tokens(micro_batch))
        on_device = micro_batch.to(self._strategy.device)
        return MicroBatchLoss(on_device, work.algorithm, context, float(batch.num_targets), teacher_head)

    def _teacher_head(self, micro_batch: MicroBatch) -> StudentHead | None:
        """The teacher at the rollouts' states; None where there are none."""
        return self._teacher_on(rollout_tokens(micro_batch)) if micro_batch.num_states else None

    def _teacher_on(self, tokens: TokenBatch) -> StudentHead:
        assert self._teacher is not None, "the rank did not load the teacher"
        return self._teacher.head(tokens.to(self._strategy.device))

    def _generator(self, step: int, index: int) -> torch.Generator:
        """Random numbers of one micro-batch: a resumed run draws the same, ranks draw different ones."""
        words = [self._config.train.seed % 2**32, step, index, self._strategy.get_rank()]
        [seed] = np.random.SeedSequence(words).generate_state(1, np.uint64).tolist()
        # PyTorch takes seeds up to 2^63.
        return torch.Generator(self._strategy.device).manual_seed(seed >> 1)

    def _pair(self, total: float, *, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        pair = torch.tensor([total, weight], dtype=torch.float64, device=self._strategy.device)
        return pair[0], pair[1]

    def _require_finite(self, work: _Work, not_finite: Sequence[Tensor]) -> None:
        flags = torch.stack(list(not_finite))
        any_loss = self._strategy.all_reduce(flags.any().double(), "max").item() > 0
        if not any_loss and self._strategy.gradients_are_finite(self._student.engine):
            return
        mine = self._names_not_finite(work, flags.tolist()) if any_loss else _names(work.batch.micro_batches)
        names = [name for names in self._strategy.gather(mine) for name in names]
        listed = ", ".join(names[:MAX_NAMES]) + (
            f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        )
        raise TrainingError(
            f"step {work.step}: the {'loss' if any_loss else 'gradient'} is not finite in {listed}. No weight was "
            "changed; look at these rows, lower --actor.adam.lr, or resume from a checkpoint before the loss grew"
        )

    @torch.no_grad()
    def _names_not_finite(self, work: _Work, flags: Sequence[bool]) -> list[str]:
        """Rows and blocks to blame: those whose own loss is not finite, or all of a micro-batch if none is by itself.

        Computes every micro-batch again on every rank, since under ZeRO-3 ranks meet in each.
        """
        names: list[str] = []
        for index, (micro_batch, flag) in enumerate(zip(work.batch.micro_batches, flags, strict=True)):
            found = self._forward(micro_batch.tokens, self._loss(work, index).items_not_finite).tolist()
            if flag and micro_batch.weight:
                own = [name for name, bad in zip(micro_batch.names, found, strict=True) if bad]
                names += own or micro_batch.names
        return names

    def _reduced(self, metrics: Metrics) -> dict[str, float]:
        """Sums and weights added over ranks, then divided."""
        names = sorted({name for names in self._strategy.gather(sorted(metrics)) for name in names})
        nothing = self._pair(0.0, weight=0.0)
        pairs = torch.stack([torch.stack(metrics.get(name, nothing)) for name in names])
        totals = self._strategy.all_reduce(pairs, "sum").cpu()
        return mean_metrics({name: (total, weight) for name, (total, weight) in zip(names, totals, strict=True)})

    def _warm_up(self, step: int) -> dict[str, float]:
        return {"td_scale": td_scale_at(step, self._options)} if self._options.td_warmup_steps else {}

    def _speed(self, batch: StepBatch, compute_s: float) -> dict[str, float]:
        """Tokens a second and utilisation while computing; padding and fillers are no tokens."""
        flops = step_flops(
            self._utilisation.counts,
            num_tokens=batch.num_input_tokens,
            num_states=batch.num_tokens + batch.num_targets,
            sum_squared_lengths=batch.sum_squared_lengths,
        )
        return {
            "tokens": float(batch.num_input_tokens),
            "tokens_per_s": batch.num_input_tokens / compute_s,
            "mfu": flops / (compute_s * self._utilisation.peak_tflops * TERA),
        }


def _names(micro_batches: Sequence[MicroBatch]) -> list[str]:
    return [name for micro_batch in micro_batches for name in micro_batch.names if micro_batch.weight]


def _use_of(batch: StepBatch) -> dict[str, float]:
    """How well the step uses ranks and token budget."""
    balance = batch.balance
    fill = {} if balance.fill is None else {"fill": balance.fill}
    return {
        "micro_batches": float(balance.num_micro_batches),
        "padding_share": balance.padding_share,
        "token_imbalance": balance.token_imbalance,
        "square_imbalance": balance.square_imbalance,
        **fill,
    }
