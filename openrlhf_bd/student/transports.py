"""How the student's weights travel to engines: by gloo between CPUs, NCCL between GPUs, CUDA IPC within one GPU.

Every rank has its end of the group. All ranks send at once, since they put parameters together in step; by gloo and
NCCL it is rank 0 alone that speaks to the engines, by IPC each rank speaks to the engines on its own GPU.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from torch import Tensor

from openrlhf_bd.engines.arguments import Transfer
from openrlhf_bd.engines.cuda_transfer import ipc_chunks, nccl_broadcast, nccl_init_info, open_nccl
from openrlhf_bd.engines.gloo_group import GlooGroup, meeting_place, pack
from openrlhf_bd.errors import ClusterError
from openrlhf_bd.rollout.calls import answers, control
from openrlhf_bd.student.strategy import BellmanStrategy


class Source(Protocol):
    """What is sent, see `student.weights.WeightSource`."""

    @property
    def bucket_lengths(self) -> list[int]: ...

    def wire_info(self) -> dict[str, Any]: ...

    def buckets(self) -> Iterator[list[tuple[str, Tensor]]]: ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class WeightGroup(ABC):
    """A rank's end of the group; construction waits until the engines have joined.

    Args:
        strategy: of this rank.
        engines: actor handles of `RolloutEngine`.
        address: of this rank's machine.
        workers_per_engine: of vLLM.
        buffer_bytes: room for any one bucket.
        timeout_s: longest wait for the engines, and for one bucket.

    Raises:
        ClusterError: the engines did not join in time.
    """

    def __init__(
        self,
        strategy: BellmanStrategy,
        engines: Sequence[Any],
        *,
        address: str,
        workers_per_engine: int,
        buffer_bytes: int,
        timeout_s: float,
    ) -> None:
        self._strategy, self._engines = strategy, engines
        self._address, self._workers = address, workers_per_engine
        self._buffer_bytes, self._timeout_s = buffer_bytes, timeout_s
        if strategy.is_rank_0():
            self._connect()

    @property
    def _size(self) -> int:
        return 1 + self._workers * len(self._engines)

    @abstractmethod
    def _connect(self) -> None:
        """Let the engines join, on rank 0."""

    @abstractmethod
    def send(self, source: Source) -> None:
        """Send all of it, and wait until the engines have loaded it. Collective.

        Raises:
            ClusterError: an engine did not get or load it; on rank 0.
        """

    def _let_join(self, init_info: Mapping[str, Any], meet: Callable[[], Any]) -> Any:
        """What this rank's own end gives, once the engines have joined."""
        refs = [
            control(engine.join_weight_group).remote({**init_info, "rank_offset": 1 + self._workers * place})
            for place, engine in enumerate(self._engines)
        ]
        try:
            group = meet()
        except RuntimeError as error:
            raise ClusterError(
                f"rank 0 could not form the group for weights with {len(self._engines)} engines ({error})"
            ) from error
        self._answers(refs, "join the group for weights")
        return group

    def _let_receive(self, update_info: Mapping[str, Any]) -> list[Any]:
        return [control(engine.receive_weights).remote(update_info) for engine in self._engines]

    def _answers(self, refs: Sequence[Any], what: str) -> None:
        answers(refs, who="engine", what=what, timeout_s=self._timeout_s)


class GlooWeightGroup(WeightGroup):
    """Rank 0 broadcasts one bucket after another over gloo."""

    _group: GlooGroup

    def _connect(self) -> None:
        store = meeting_place(self._address, 0, is_sender=True, timeout_s=self._timeout_s)
        info = {
            "master_address": self._address,
            "master_port": store.port,
            "world_size": self._size,
            "timeout_s": self._timeout_s,
        }
        self._group = self._let_join(info, lambda: GlooGroup(store, rank=0, size=self._size, timeout_s=self._timeout_s))

    def send(self, source: Source) -> None:
        if not self._strategy.is_rank_0():
            _put_together(source)
            return
        refs = self._let_receive(source.wire_info() | {"bucket_lengths": source.bucket_lengths})
        error: ClusterError | None = None
        for bucket in source.buckets():
            # After a failure only the ranks' own part goes on.
            if error is None:
                error = self._broadcast(bucket, refs)
        if error is not None:
            raise error
        self._answers(refs, "load weights")

    def _broadcast(self, bucket: Sequence[tuple[str, Tensor]], refs: Sequence[Any]) -> ClusterError | None:
        try:
            _raise_early(refs)
            self._group.broadcast(pack([tensor for _, tensor in bucket]))
        except (RuntimeError, RayError) as error:
            return ClusterError(f"rank 0 could not send {bucket[0][0]} to {bucket[-1][0]} to the engines ({error})")
        return None


class NcclWeightGroup(WeightGroup):
    """Rank 0 broadcasts over NCCL to vLLM's own receiving end.

    NCCL has no timeout: with an engine that dies meanwhile rank 0 hangs, and the driver's limit ends the wait.
    """

    _group: Any

    def _connect(self) -> None:
        info = nccl_init_info(self._address, _free_port(), size=self._size, buffer_bytes=self._buffer_bytes)
        self._group = self._let_join(info, lambda: open_nccl(info))

    def send(self, source: Source) -> None:
        if not self._strategy.is_rank_0():
            _put_together(source)
            return
        refs = self._let_receive(source.wire_info())
        nccl_broadcast(self._group, iter(source), buffer_bytes=self._buffer_bytes)
        self._answers(refs, "load weights")


class IpcWeightGroup(WeightGroup):
    """Each rank puts the weights into a buffer that the engines on its GPU read; rank 0 tells them when."""

    def _connect(self) -> None:
        refs = [control(engine.join_weight_group).remote({"packed": True}) for engine in self._engines]
        self._answers(refs, "join the group for weights")

    def send(self, source: Source) -> None:
        for chunk in ipc_chunks(iter(source), buffer_bytes=self._buffer_bytes):
            handles = {
                uuid: handle for part in self._strategy.gather(chunk["ipc_handles"]) for uuid, handle in part.items()
            }
            error = self._offer(chunk | {"ipc_handles": handles}) if self._strategy.is_rank_0() else None
            # The buffer is filled anew only when every engine has read it; and all ranks stop at a failure.
            error = self._strategy.gather(error)[0]
            if error is not None:
                raise error
        dist.barrier()
        torch.cuda.ipc_collect()

    def _offer(self, chunk: Mapping[str, Any]) -> ClusterError | None:
        try:
            self._answers(self._let_receive(chunk), "load weights")
        except ClusterError as error:
            return error
        return None


GROUPS: dict[Transfer, type[WeightGroup]] = {"gloo": GlooWeightGroup, "nccl": NcclWeightGroup, "ipc": IpcWeightGroup}


def _put_together(source: Source) -> None:
    """A rank's part in what another rank sends."""
    for _ in source.buckets():
        pass


def _raise_early(refs: Sequence[Any]) -> None:
    """Raise what an engine answered that should still be receiving."""
    early, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
    ray.get(early)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])
