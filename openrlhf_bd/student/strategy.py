"""DeepSpeed for the student's ranks: OpenRLHF's strategy, also on CPUs. Device differences of training live here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from openrlhf_bd.config import Config, DeepspeedConfig
from openrlhf_bd.errors import ConfigError, StoreError
from openrlhf_bd.student.checkpoints import (
    PARTIAL,
    Seal,
    checkpoint_files,
    damaged_files,
    read_seal,
    remove_old,
    seal_checkpoint,
    settled_digest,
)
from openrlhf_bd.upstream import DeepspeedStrategy, is_cpu

PARAM_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def checkpoint_folder(config: Config) -> Path:
    """Folder of a run's checkpoints: --ckpt.path, or `checkpoints` in the run's own folder."""
    return Path(config.ckpt.path) if config.ckpt.path else Path(config.ckpt.output_dir) / "checkpoints"


def strategy_arguments(config: Config) -> SimpleNamespace:
    """The options as OpenRLHF's classes read them: one nested namespace, with the upstream options that we don't offer.

    Args:
        config: options of the job.
    """
    arguments = _namespace(config.model_dump())
    arguments.local_rank = -1
    arguments.use_ms = False
    arguments.ckpt.path = str(checkpoint_folder(config))
    arguments.ds.tensor_parallel_size = 1
    arguments.ds.ring_attn_size = 1
    return arguments


def _namespace(values: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(
        **{name: _namespace(value) if isinstance(value, dict) else value for name, value in values.items()}
    )


def make_strategy(config: Config) -> BellmanStrategy:
    """The strategy of a job, to be sent to its ranks.

    Raises:
        ConfigError: a pair of options that DeepSpeed cannot train with.
    """
    return BellmanStrategy(config)


class BellmanStrategy(DeepspeedStrategy):
    """OpenRLHF's DeepSpeed strategy over whatever accelerator DeepSpeed finds.

    What differs from upstream, besides CPUs: fp32 parameters; a step has as many micro-batches as its rows need, so
    DeepSpeed's own accumulation is one and `backward(..., last=...)` says where a step ends; and gradients are checked
    before they are used.
    """

    def __init__(self, config: Config) -> None:
        _refuse_unreliable(config.ds)
        _refuse_muon(config)
        super().__init__(
            seed=config.train.seed,
            full_determinism=config.train.full_determinism_enable,
            max_norm=config.actor.max_norm,
            micro_train_batch_size=config.train.micro_batch_size,
            train_batch_size=config.train.batch_size,
            zero_stage=config.ds.zero_stage,
            args=strategy_arguments(config),
        )
        # Upstream's setting for a number of micro-batches that changes from step to step: DeepSpeed divides nothing.
        self.use_dynamic_batch = True

    @property
    def device(self) -> torch.device:
        """Device of this rank's parameters."""
        return torch.device(get_accelerator().current_device_name())

    def setup_distributed(self, timeout: timedelta = timedelta(minutes=60)) -> None:
        """Join the process group: upstream's way on GPUs, gloo on CPUs."""
        if not is_cpu():
            super().setup_distributed(timeout)
            return
        if self.full_determinism:
            transformers.enable_full_determinism(self.seed)
        else:
            transformers.set_seed(self.seed)
        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), timeout=timeout)
        self.world_size = dist.get_world_size()
        self.ds_device_mesh = init_device_mesh("cpu", (self.world_size, 1, 1), mesh_dim_names=("dp", "sp", "tp"))
        self.setup_ring_attn(self.ds_device_mesh)

    def get_ds_train_config(
        self, optim_dict: dict[str, Any] | None = None, *, max_norm: float | None = None
    ) -> dict[str, Any]:
        """Upstream's DeepSpeed configuration; on CPUs with torch's Adam, which needs no compiler."""
        if is_cpu():
            self.adam_offload = False
            if optim_dict is not None:
                optim_dict["params"]["torch_adam"] = True
        ds_config: dict[str, Any] = super().get_ds_train_config(optim_dict, max_norm=max_norm)
        return ds_config

    def backward(self, loss: Tensor, model: Any, optimizer: Any = None, *, last: bool = True, **_: Any) -> None:
        """Gradients of a micro-batch's loss, averaged over ranks, added to those of the step so far.

        Args:
            loss: scalar.
            model: DeepSpeed engine.
            optimizer: not used; DeepSpeed has it.
            last: whether this is the step's last micro-batch.
        """
        model.set_gradient_accumulation_boundary(last)
        model.backward(loss)

    def gradients_are_finite(self, model: Any) -> bool:
        """Whether the reduced gradients of all ranks are finite, after the last backward pass of a step. Collective.

        DeepSpeed skips a step with such gradients without a word in some configurations and takes it in others. With
        fp16 skipping is part of loss scaling, so it is left to DeepSpeed.
        """
        if self.param_dtype == "fp16":
            return True
        if isinstance(model.optimizer, ZeROOptimizer):
            model.optimizer.check_overflow()
            return not model.optimizer.overflow
        return bool(torch.isfinite(_gradient_norm(model)))

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any, name: str = "model", **_: Any) -> float:
        """One step of optimizer and schedule.

        Returns:
            The gradient norm before clipping.
        """
        if isinstance(model.optimizer, ZeROOptimizer) or self.param_dtype == "fp16":
            model.step()
            return float(self.get_grad_norm(model))
        # Plain data parallelism: DeepSpeed clips but does not report the norm.
        norm = float(_gradient_norm(model))
        model.step()
        return norm

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        """Upstream's reduction of a tensor, number or dictionary over ranks: "mean", "max" or "sum"."""
        if not is_cpu():
            return super().all_reduce(data, op)
        if isinstance(data, dict):
            return {name: self.all_reduce(value, op) for name, value in data.items()}
        tensor = data if isinstance(data, Tensor) else torch.tensor([data], dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        if op == "mean":
            tensor /= self.world_size
        return tensor if isinstance(data, Tensor) else tensor.item()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order of rank. Collective; values are pickled."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_rank_0(self, action: Callable[[], object]) -> None:
        """Run an action on files on rank 0 while the others wait; if it fails, it fails on all ranks.

        Raises:
            OSError: what the action raised, on every rank.
        """
        error: OSError | None = None
        if self.is_rank_0():
            try:
                action()
            except OSError as caught:
                error = caught
        error = self.gather(error)[0]
        if error is not None:
            raise error

    def save_ckpt(
        self,
        model: Any,
        save_dir: str,
        tag: str,
        max_num: int = 3,
        max_mem: float = 1000,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        metric_value: float | None = None,
        metric_key: str | None = None,
        write_more: Callable[[Path], object] | None = None,
    ) -> None:
        """A checkpoint in upstream's layout, that is there whole or not at all. Collective.

        Old ones are removed only after the new one is whole. Arguments as upstream's; `latest` is always written.
        `write_more` adds files of our own to the folder, on rank 0.
        """
        folder = Path(save_dir)
        partial, target = folder / f"{tag}{PARTIAL}", folder / tag
        self.on_rank_0(lambda: shutil.rmtree(partial) if partial.exists() else None)
        model.save_checkpoint(save_dir, tag=partial.name, client_state=client_state or {}, save_latest=False)
        if write_more is not None:
            self.on_rank_0(lambda: write_more(partial))
        dist.barrier()
        mine = checkpoint_files(partial)[self.get_rank() :: self.world_size]
        parts = self.gather({name: settled_digest(partial / name) for name in mine})
        seal = Seal(
            files={name: digest for part in parts for name, digest in part.items()},
            num_ranks=self.world_size,
            zero_stage=self.stage,
        )

        def finish() -> None:
            seal_checkpoint(partial, target, seal, metric_value=metric_value, metric_key=metric_key)
            remove_old(folder, newest=tag, max_num=max_num, max_gigabytes=max_mem)

        self.on_rank_0(finish)

    def load_ckpt(self, model: Any, load_dir: str, tag: str, **options: Any) -> tuple[str, dict[str, Any]]:
        """Load a whole, undamaged checkpoint. Collective.

        Returns:
            (path, DeepSpeed's client state, which has its own keys beside those that were saved).

        Raises:
            StoreError: it is missing, not whole, or a file's content has changed.
            ConfigError: it was written by another number of ranks or another ZeRO stage.
        """
        folder = Path(load_dir) / tag
        seal = read_seal(folder)
        written, here = (seal.num_ranks, seal.zero_stage), (self.world_size, self.stage)
        if written != here and not self.use_ds_universal_ckpt:
            raise ConfigError(
                f"{folder} was written by {written[0]} ranks with --ds.zero_stage {written[1]}; this job has "
                f"{here[0]} and {here[1]}. Resume with the same, or convert it by DeepSpeed's ds_to_universal "
                "(--inject_missing_state) and add --ds.use_universal_ckpt"
            )
        mine = sorted(seal.files)[self.get_rank() :: self.world_size]
        damaged = sorted(name for part in self.gather(damaged_files(folder, seal, mine)) for name in part)
        if damaged:
            raise StoreError(
                f"{folder}: {', '.join(damaged)} changed after writing; remove the folder to resume from an older "
                "checkpoint"
            )
        path, states = model.load_checkpoint(load_dir, tag, **options)
        if path is None:
            raise StoreError(f"{folder}: DeepSpeed found no checkpoint there; remove the folder to use an older one")
        return path, states


def _refuse_unreliable(ds: DeepspeedConfig) -> None:
    if ds.param_dtype != "bf16":
        return
    if ds.zero_stage == 0:
        raise ConfigError(
            "--ds.zero_stage 0 with --ds.param_dtype bf16: DeepSpeed keeps no fp32 weights there, training diverges; "
            "use --ds.zero_stage 1, 2 or 3, or --ds.param_dtype fp32"
        )
    if ds.zero_stage == 1 and ds.grad_accum_dtype not in (None, "bf16"):
        raise ConfigError(
            f"--ds.zero_stage 1 with --ds.param_dtype bf16 and --ds.grad_accum_dtype {ds.grad_accum_dtype}: "
            "DeepSpeed's optimizer for these does not report gradients that are not finite; use --ds.zero_stage 2"
        )


def _refuse_muon(config: Config) -> None:
    """What DeepSpeed's Muon does not do, or does to no good, is refused rather than ignored."""
    if config.actor.optim != "muon":
        return
    ds = config.ds
    if ds.zero_stage not in (1, 2):
        raise ConfigError(
            f"--actor.optim muon with --ds.zero_stage {ds.zero_stage}: without ZeRO DeepSpeed "
            "steps by the plain gradient, and ZeRO-3 with scattered gradients refuses it; use --ds.zero_stage 1 or 2"
        )
    if ds.param_dtype == "fp16":
        raise ConfigError(
            "--actor.optim muon with --ds.param_dtype fp16: DeepSpeed divides the finished update by the loss scale; "
            "use bf16 or fp32"
        )
    if ds.adam_offload:
        raise ConfigError("--actor.optim muon with --ds.adam_offload: DeepSpeed cannot do both; leave one of them away")
    if config.actor.max_norm > 0:
        raise ConfigError(
            f"--actor.optim muon with --actor.max_norm {config.actor.max_norm:g}: DeepSpeed clips the finished update, "
            "whose norm says nothing of the gradient's, to almost nothing; use --actor.max_norm 0"
        )


def _gradient_norm(model: nn.Module) -> Tensor:
    """2-norm of all gradients of a model whose ranks hold the same, whole gradients."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
