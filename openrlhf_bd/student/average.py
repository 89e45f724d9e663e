"""Running average of a student's trained parameters: what EMA validates and saves, and what a target network is.

Each rank averages what it holds of a parameter: all of it, or under ZeRO-3 its own part. Updates need no communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError

# The average that is validated and saved instead of the student itself.
EMA = "ema"
# The one whose values of next states the loss reads (--algo.distill.next_value_gradient target).
TARGET = "target"


def make_averages(engine: Any, config: Config, needs: Needs) -> dict[str, ParameterAverage]:
    """The averages that the options ask for, by name.

    Args:
        engine: DeepSpeed engine around the student.
        config: options of the job.
        needs: of the algorithm.
    """
    decays = {}
    if config.train.enable_ema:
        decays[EMA] = config.train.ema_beta
    if needs.target_network:
        decays[TARGET] = config.algo.distill.target_decay
    return {name: ParameterAverage(engine, decay=decay) for name, decay in decays.items()}


def average_file(name: str) -> str:
    """File of an average in the folder of a checkpoint."""
    return f"average_{name}.safetensors"


def save_averages(averages: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """Write averages, as `ParameterAverage.whole` gives them, into the folder of a checkpoint.

    Raises:
        OSError: a file cannot be written.
    """
    for name, tensors in averages.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / average_file(name))


class ParameterAverage:
    """average <- decay * average + (1 - decay) * parameter after each optimizer step; starts at the parameters.

    Kept in fp32 beside the parameters, 4 bytes for each trained one (divided by the ranks under ZeRO-3). With adapters
    it is the adapters that are averaged.

    Args:
        engine: DeepSpeed engine around the student.
        decay: share of the old average that stays, in [0, 1).
    """

    def __init__(self, engine: Any, *, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self._partitioned = engine.zero_optimization_stage() == 3
        # Under ZeRO-3 they have attributes that nn.Parameter does not declare.
        self._parameters: dict[str, Any] = {
            name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad
        }
        self._average = {name: self._held(name).detach().float().clone() for name in self._parameters}

    def _held(self, name: str) -> Tensor:
        """What this rank holds of a parameter, in the parameters' own type; flat and padded under ZeRO-3."""
        parameter = self._parameters[name]
        held: Tensor = parameter.ds_tensor if self._partitioned else parameter
        return held

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters in, once after each optimizer step."""
        for name, average in self._average.items():
            average.mul_(self._decay).add_(self._held(name), alpha=1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the engine's parameters are the average, in their own type; nothing has gradient. Collective.

        A forward pass, or whatever saves the engine's weights, then sees the averaged student, without a second model.
        Not between a forward pass and its backward pass. What should outlive the context must be detached from its
        parameter (`weight.detach()`), and then keeps the average.
        """
        module = self._engine.module
        training = module.training
        own = {name: self._held(name).data for name in self._parameters}
        self._put({name: average.to(own[name].dtype) for name, average in self._average.items()})
        module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            module.train(training)
            self._put(own)

    def _put(self, values: dict[str, Tensor]) -> None:
        """Let the parameters point at other values; under ZeRO-3 no rank may hold a gathered copy of the old ones."""
        optimizer = self._engine.optimizer
        if self._partitioned:
            optimizer.checkpoint_event_prologue()
        for name, value in values.items():
            self._held(name).data = value
        if self._partitioned:
            optimizer.checkpoint_event_epilogue()

    def whole(self) -> dict[str, Tensor]:
        """The average by name, on CPU, each with its parameter's shape; on rank 0, empty elsewhere. Collective."""
        whole = {}
        for name in self._average:
            tensor = self._gathered(name)
            if dist.get_rank() == 0:
                whole[name] = tensor.cpu()
        return whole

    def _gathered(self, name: str) -> Tensor:
        average, parameter = self._average[name], self._parameters[name]
        if not self._partitioned:
            return average
        group = parameter.ds_process_group
        parts = [torch.empty_like(average) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, average, group=group)
        return torch.cat(parts)[: parameter.ds_numel].view(tuple(parameter.ds_shape))

    def load(self, path: Path) -> None:
        """Take an average that `whole` gave, as it was written to a safetensors file.

        Raises:
            ConfigError: the file is not there.
        """
        if not path.is_file():
            raise ConfigError(
                f"{path.parent} has no {path.name}: the run that wrote it kept no such average. Start anew, or resume "
                "with that run's --train.enable_ema and --algo.distill.next_value_gradient"
            )
        with safe_open(path, framework="pt") as file:
            for name, average in self._average.items():
                average.copy_(self._part_of(file.get_tensor(name), name))

    def _part_of(self, whole: Tensor, name: str) -> Tensor:
        """This rank's part of a whole tensor."""
        if not self._partitioned:
            return whole
        size, rank = self._average[name].numel(), dist.get_rank(self._parameters[name].ds_process_group)
        part = whole.flatten()[rank * size : (rank + 1) * size]
        return torch.nn.functional.pad(part, (0, size - part.numel()))
