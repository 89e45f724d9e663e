"""Broadcast from one process to others that share no process group with it otherwise: gloo over TCP.

Needs torch alone, so that a student's rank does not import vLLM for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def meeting_place(address: str, port: int, *, is_sender: bool, timeout_s: float) -> dist.TCPStore:
    """Where the members of a group meet.

    Args:
        address: of the sender's machine.
        port: of its store; 0, for the sender: a free one, which the store's `port` then says.
        is_sender: the sender listens, the others connect.
        timeout_s: longest wait for a connection.

    Raises:
        RuntimeError: nobody listens there.
    """
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(address, port, is_master=is_sender, timeout=timeout, wait_for_workers=False)


class GlooGroup:
    """One sender, member 0, and receivers.

    Args:
        store: where they meet.
        rank: of this member.
        size: members.
        timeout_s: longest wait for the members to come, and for one broadcast.

    Raises:
        RuntimeError: the members did not come in time.
    """

    def __init__(self, store: dist.TCPStore, *, rank: int, size: int, timeout_s: float) -> None:
        self._store = store
        self._group: Any = dist.ProcessGroupGloo(
            dist.PrefixStore("weights", store), rank, size, timedelta(seconds=timeout_s)
        )

    def broadcast(self, tensor: Tensor) -> None:
        """Member 0's tensor to all, in place. All give the same shape and type.

        Raises:
            RuntimeError: a member did not take part in time, or went away.
        """
        self._group.broadcast(tensor, 0).wait()


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors one after another as bytes, uint8 of one dimension."""
    return torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])


def unpack(packed: Tensor, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The tensors that `pack` was given. They share memory with the bytes where these are aligned."""
    tensors, offset = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        size = num_bytes(shape, dtype)
        part = packed[offset : offset + size]
        part = part if offset % dtype.itemsize == 0 else part.clone()
        tensors.append(part.view(dtype).view(tuple(shape)))
        offset += size
    return tensors


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize
