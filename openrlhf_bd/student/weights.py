"""The student's weights, put together from its ranks one bucket at a time, and one rank's part in sending them.

Engines sample from what arrives; how it travels is in `student.transports`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from openrlhf_bd.engines.arguments import Transfer
from openrlhf_bd.engines.gloo_group import num_bytes
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.rollout.calls import answers, control
from openrlhf_bd.student.strategy import BellmanStrategy
from openrlhf_bd.student.transports import GROUPS

# Memory for parameters that are put together, unless a single one is larger.
BUCKET_BYTES = 2**28
# Where these differ, so do shapes.
_SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter as it is sent: its name in the checkpoint, its type on the wire, its whole shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.shape, self.dtype)


class WeightSource:
    """The parameters of a student, bucket by bucket. All ranks iterate at once; tied parameters come once.

    Args:
        engine: DeepSpeed engine around a StudentModel.
        dtype: of the engines' weights. Parameters that are wider are rounded to it before they are sent.
        bucket_bytes: parameters put together at once.

    Attributes:
        gather_s: seconds that the last iteration spent putting parameters together.
    """

    def __init__(self, engine: Any, *, dtype: torch.dtype, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._bucket_bytes = bucket_bytes
        self._is_partitioned = engine.zero_optimization_stage() == 3
        self._buckets: list[list[tuple[Weight, Any]]] = []
        self.gather_s = 0.0
        room = 0
        for name, parameter in engine.module.named_parameters():
            wire = dtype if dtype.itemsize < parameter.dtype.itemsize else parameter.dtype
            shape = parameter.ds_shape if self._is_partitioned else parameter.shape
            size = num_bytes(shape, parameter.dtype)
            if size > room:
                self._buckets.append([])
                room = bucket_bytes
            room -= size
            self._buckets[-1].append((Weight(name.removeprefix("model."), wire, tuple(shape)), parameter))

    @property
    def weights(self) -> list[Weight]:
        """What iteration gives, in order."""
        return [weight for bucket in self._buckets for weight, _ in bucket]

    @property
    def bucket_lengths(self) -> list[int]:
        """Parameters of each bucket."""
        return [len(bucket) for bucket in self._buckets]

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire."""
        return sum(weight.num_bytes for weight in self.weights)

    @property
    def buffer_bytes(self) -> int:
        """Room that any one bucket fits into."""
        return max([self._bucket_bytes, *(weight.num_bytes for weight in self.weights)])

    def wire_info(self) -> dict[str, Any]:
        """Names, types and shapes, as vLLM's weight transfer wants them."""
        weights = self.weights
        return {
            "names": [weight.name for weight in weights],
            "dtype_names": [str(weight.dtype).removeprefix("torch.") for weight in weights],
            "shapes": [list(weight.shape) for weight in weights],
        }

    def buckets(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Whole parameters by name, valid until the next bucket. Collective."""
        self.gather_s = 0.0
        for bucket in self._buckets:
            started = time.monotonic()
            parameters = [parameter for _, parameter in bucket]
            with deepspeed.zero.GatheredParameters(parameters) if self._is_partitioned else nullcontext():
                tensors = [(weight.name, parameter.detach().to(weight.dtype)) for weight, parameter in bucket]
                get_accelerator().synchronize()
                self.gather_s += time.monotonic() - started
                yield tensors

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters by name, one after another. Collective."""
        for bucket in self.buckets():
            yield from bucket


class WeightSender:
    """One rank's part in sending the student to engines. Construction and `send` are collective.

    Args:
        engine: DeepSpeed engine around a StudentModel.
        strategy: of this rank.
        engines: actor handles of `RolloutEngine`.
        transfer: how weights travel.
        address: of this rank's machine.
        workers_per_engine: of vLLM.
        timeout_s: longest wait for the engines, and for one bucket.

    Raises:
        ConfigError: an engine hosts another architecture.
        ClusterError: the group did not come together.
    """

    def __init__(
        self,
        engine: Any,
        strategy: BellmanStrategy,
        engines: Sequence[Any],
        *,
        transfer: Transfer,
        address: str,
        workers_per_engine: int,
        timeout_s: float,
    ) -> None:
        self._engines = list(engines)
        refs = [control(handle.weight_target).remote() for handle in self._engines]
        targets = answers(refs, who="engine", what="describe its model", timeout_s=timeout_s)
        config = engine.module.model.config.to_dict()
        for place, target in enumerate(targets):
            _check_same_shapes(config, target["config"], place)
        self._source = WeightSource(engine, dtype=getattr(torch, targets[0]["dtype"]))
        self._group = GROUPS[transfer](
            strategy,
            self._engines,
            address=address,
            workers_per_engine=workers_per_engine,
            buffer_bytes=self._source.buffer_bytes,
            timeout_s=timeout_s,
        )

    def send(self) -> dict[str, float]:
        """Send the parameters as they are now.

        Returns:
            "gather_s" and "transfer_s" of this rank, and "bytes".

        Raises:
            ClusterError: an engine did not get or load them; on rank 0.
        """
        started = time.monotonic()
        with torch.no_grad():
            self._group.send(self._source)
        elapsed_s, gather_s = time.monotonic() - started, self._source.gather_s
        return {"gather_s": gather_s, "transfer_s": elapsed_s - gather_s, "bytes": self._source.num_bytes}


def trained_weights(engine: Any) -> dict[str, Tensor]:
    """The trained parameters alone by name, whole and on CPU, on rank 0; empty elsewhere. Collective."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_partitioned = engine.zero_optimization_stage() == 3
        with deepspeed.zero.GatheredParameters([parameter]) if is_partitioned else nullcontext():
            if dist.get_rank() == 0:
                found[name.removeprefix("model.")] = parameter.detach().cpu().clone()
    return found


def _check_same_shapes(student: Mapping[str, Any], engine: Mapping[str, Any], place: int) -> None:
    other = [key for key in _SHAPE_KEYS if student.get(key) != engine.get(key)]
    if other:
        found = ", ".join(f"{key} {engine.get(key)} (the student's: {student.get(key)})" for key in other)
        raise ConfigError(f"engine {place} hosts another model than the student: {found}; start it with the student's")
