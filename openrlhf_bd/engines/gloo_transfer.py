"""Weights into a vLLM worker on CPU: the backend "gloo" of vLLM's weight transfer, beside its own "nccl" and "ipc".

Only vLLM's workers import this module, by the name of the extension in the engine's arguments; that registers the
backend before the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from openrlhf_bd.engines.gloo_group import GlooGroup, meeting_place, num_bytes, unpack


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """How a worker joins the sender's group.

    Attributes:
        master_address: where the sender listens.
        master_port: and on which port.
        rank_offset: member number of the engine's first worker.
        world_size: members, the sender included.
        timeout_s: longest wait for the members, and for one bucket.
    """

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What the sender is about to broadcast.

    Attributes:
        names: of the weights, as the checkpoint has them.
        dtype_names: their types, as "float32".
        shapes: their whole shapes.
        bucket_lengths: weights of each broadcast; they sum to the number of names.
    """

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    bucket_lengths: list[int]


class GlooWeightTransfer(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives buckets of weights and loads them layer by layer, as vLLM's own backends do."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    _group: GlooGroup | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        timeout_s = init_info.timeout_s
        store = meeting_place(init_info.master_address, init_info.master_port, is_sender=False, timeout_s=timeout_s)
        rank = init_info.rank_offset + self.parallel_config.rank
        self._group = GlooGroup(store, rank=rank, size=init_info.world_size, timeout_s=timeout_s)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        model: Any = self.model
        error: Exception | None = None
        for weights in self._received(update_info):
            # What cannot be loaded is received all the same: the sender must not wait for one engine that failed.
            if error is None:
                try:
                    model.load_weights(iter(weights))
                except (AssertionError, KeyError, RuntimeError, ValueError) as caught:
                    error = caught
        if error is not None:
            raise error

    def _received(self, info: GlooUpdateInfo) -> Iterator[list[tuple[str, Tensor]]]:
        assert self._group is not None, "init_transfer_engine comes first"
        dtypes = [getattr(torch, name) for name in info.dtype_names]
        first = 0
        for length in info.bucket_lengths:
            part = slice(first, first + length)
            shapes = info.shapes[part]
            size = sum(num_bytes(shape, dtype) for shape, dtype in zip(shapes, dtypes[part], strict=True))
            packed = torch.empty(size, dtype=torch.uint8)
            self._group.broadcast(packed)
            yield list(zip(info.names[part], unpack(packed, shapes, dtypes[part]), strict=True))
            first += length

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        # On CPUs a layer computes with a packed copy of its weight. An output head that is tied to the input embedding
        # gets no weight of its own, so nothing has packed it anew.
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        self._group = None


class GlooTransferExtension:
    """Named as a worker's extension, so that every worker imports this module."""


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransfer)
