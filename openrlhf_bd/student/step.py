"""One optimizer step of a rank: gradients of its micro-batches, a check that all is finite, the step, exact metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openrlhf_bd.algorithms.base import Algorithm
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.data.micro_batches import MicroBatch, PretrainBatch, TokenBatch
from openrlhf_bd.errors import TrainingError
from openrlhf_bd.functional.cross_entropy import token_cross_entropy
from openrlhf_bd.functional.head import DenseHead, StudentHead, mean_log_sum_exp
from openrlhf_bd.functional.metrics import Metrics, mean_metrics, merge_metrics
from openrlhf_bd.student.data import Part, StepBatch
from openrlhf_bd.student.strategy import BellmanStrategy

MAX_NAMES = 8


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
class PartLoss:
    """Loss of one micro-batch.

    Attributes:
        name: policy_loss or ptx_loss.
        loss: its share of that loss of the global batch. Gradient flows.
        coefficient: of that loss in the loss that is minimised.
        metrics: name -> (sum, weight).
    """

    name: str
    loss: Tensor
    coefficient: float
    metrics: Metrics


class StudentStep:
    """Computes steps of one rank.

    Args:
        student: engine, optimizer and schedule.
        strategy: of this rank.
        options: --algo.distill.*
    """

    def __init__(self, student: TrainedModel, strategy: BellmanStrategy, options: DistillConfig) -> None:
        self._student, self._strategy, self._options = student, strategy, options

    def run(self, step: int, batch: StepBatch, algorithm: Algorithm, *, data_s: float) -> dict[str, float]:
        """One optimizer step. Collective.

        Args:
            step: counted from 1, for messages.
            batch: this rank's micro-batches.
            algorithm: whose loss is minimised.
            data_s: seconds that reading the batch took.

        Returns:
            Metrics over all ranks, the same on each.

        Raises:
            TrainingError: a loss or gradient is not finite; on all ranks, before any weight changes.
        """
        started = time.monotonic()
        metrics, not_finite = self._gradients(batch, algorithm)
        self._require_finite(step, not_finite)
        gradients_done = time.monotonic()
        learning_rate = float(self._student.scheduler.get_last_lr()[0])
        engine = self._student.engine
        norm = self._strategy.optimizer_step(self._student.optimizer, engine, self._student.scheduler)
        metrics["time_data_s"] = self._pair(data_s)
        metrics["time_forward_backward_s"] = self._pair(gradients_done - started)
        metrics["time_optimizer_s"] = self._pair(time.monotonic() - gradients_done)
        values = self._reduced(metrics)
        seconds = sum(values[f"time_{part}_s"] for part in ("data", "forward_backward", "optimizer"))
        return {
            "loss": values["policy_loss"] + self._options.pretrain_coef * values.get("ptx_loss", 0.0),
            **values,
            "actor_lr": learning_rate,
            "actor_grad_norm": norm,
            "tokens_per_s": values["tokens"] / seconds,
            "response_length": batch.num_tokens / batch.num_rows,
            "total_length": (batch.num_tokens + batch.num_prompt_tokens) / batch.num_rows,
        }

    @torch.no_grad()
    def mean_logsumexp(self, batches: Iterable[StepBatch]) -> float:
        """Mean log-sum-exp of the student's logits / tau over the response tokens of global batches. Collective."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._strategy.device)
        self._student.engine.eval()
        for part in (part for batch in batches for part in batch.rollouts):
            micro_batch = part.batch.to(self._strategy.device)
            assert isinstance(micro_batch, MicroBatch)
            head = self._head(micro_batch.tokens)
            mask_S = micro_batch.trajectories.has_action_S
            sums += part.weight * torch.stack(mean_log_sum_exp(head, mask_S, tau=self._options.tau))
        total, count = self._strategy.all_reduce(sums, "sum").tolist()
        return float(total / count)

    def _head(self, tokens: TokenBatch) -> StudentHead:
        logits_SV = self._student.engine(
            tokens.input_ids, tokens.position_ids, tokens.attention_mask, tokens.state_index_S
        )
        return DenseHead(logits_SV)

    def _gradients(self, batch: StepBatch, algorithm: Algorithm) -> tuple[Metrics, list[tuple[Tensor, Part]]]:
        """Gradients of the whole step; metrics of this rank; each micro-batch, and whether its loss is not finite."""
        self._student.engine.train()
        parts = batch.rollouts + batch.pretrain
        metrics: Metrics = {}
        sums: dict[str, Tensor] = {}
        not_finite = []
        for index, part in enumerate(parts):
            output = self._loss(part, batch, algorithm)
            # DeepSpeed averages gradients over ranks; the loss is a sum over them.
            scale = output.coefficient * part.weight * self._strategy.world_size
            self._strategy.backward(output.loss * scale, self._student.engine, last=index == len(parts) - 1)
            loss = output.loss.detach().double()
            not_finite.append((~torch.isfinite(loss), part))
            for name, value in ((output.name, loss), ("tokens", self._pair(part.batch.tokens.num_tokens)[0])):
                sums[name] = sums.get(name, 0.0) + value * part.weight
            counted = {
                name: (total * part.weight, weight * part.weight) for name, (total, weight) in output.metrics.items()
            }
            metrics = merge_metrics([metrics, counted])
        # What counts is the sum over ranks, so only one rank gives a weight.
        weight = float(self._strategy.is_rank_0())
        return metrics | {name: (total, total.new_tensor(weight)) for name, total in sums.items()}, not_finite

    def _loss(self, part: Part, batch: StepBatch, algorithm: Algorithm) -> PartLoss:
        tensors = part.batch.to(self._strategy.device)
        head = self._head(tensors.tokens)
        use = self._use_of(tensors.tokens)
        if isinstance(tensors, PretrainBatch):
            every_S = torch.ones_like(tensors.target_S, dtype=torch.bool)
            loss, _ = token_cross_entropy(
                head,
                tensors.target_S,
                every_S,
                denominator=float(batch.num_targets),
                z_loss_coef=self._options.z_loss_coef,
            )
            return PartLoss("ptx_loss", loss, self._options.pretrain_coef, use)
        output = algorithm.loss(
            head,
            tensors.sets,
            tensors.trajectories,
            num_tokens=float(batch.num_tokens),
            num_rows=float(batch.num_rows),
        )
        return PartLoss("policy_loss", output.loss, 1.0, output.metrics | use)

    def _use_of(self, tokens: TokenBatch) -> Metrics:
        """Share of padding among the positions computed."""
        padding = tokens.num_positions - tokens.num_tokens
        return {"padding_share": self._pair(padding, weight=tokens.num_positions)}

    def _pair(self, total: float, *, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        pair = torch.tensor([total, weight], dtype=torch.float64, device=self._strategy.device)
        return pair[0], pair[1]

    def _require_finite(self, step: int, not_finite: Sequence[tuple[Tensor, Part]]) -> None:
        flags = torch.stack([flag for flag, _ in not_finite])
        any_loss = self._strategy.all_reduce(flags.any().double(), "max").item() > 0
        if not any_loss and self._strategy.gradients_are_finite(self._student.engine):
            return
        parts = [part for flag, part in not_finite if flag or not any_loss]
        mine = [name for part in parts for name in part.names if part.weight]
        names = [name for names in self._strategy.gather(mine) for name in names]
        listed = ", ".join(names[:MAX_NAMES]) + (
            f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        )
        raise TrainingError(
            f"step {step}: the {'loss' if any_loss else 'gradient'} is not finite in {listed}. No weight was changed; "
            "look at these rows, lower --actor.adam.lr, or resume from a checkpoint before the loss grew"
        )

    def _reduced(self, metrics: Metrics) -> dict[str, float]:
        """Sums and weights added over ranks, then divided."""
        names = sorted(metrics)
        pairs = torch.stack([torch.stack(metrics[name]) for name in names])
        totals = self._strategy.all_reduce(pairs, "sum").cpu()
        return mean_metrics({name: (total, weight) for name, (total, weight) in zip(names, totals, strict=True)})
