"""The sending side of vLLM's own weight transfer on GPUs, "nccl" and "ipc", in the form that a student's ranks need.

vLLM is imported inside the functions, by the ranks that send.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

NUM_BUFFERS = 2


def nccl_init_info(address: str, port: int, *, size: int, buffer_bytes: int) -> dict[str, Any]:
    """What engines need to join rank 0's group, besides their own place in it.

    Args:
        address: of rank 0's machine.
        port: a free one there.
        size: of the group, rank 0 included.
        buffer_bytes: of one broadcast.
    """
    return {
        "master_address": address,
        "master_port": port,
        "world_size": size,
        "packed": True,
        "packed_buffer_size_bytes": buffer_bytes,
        "packed_num_buffers": NUM_BUFFERS,
    }


def open_nccl(init_info: dict[str, Any]) -> Any:
    """Rank 0's end of the group; it waits for the engines."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    return trainer_init(init_info)


def nccl_broadcast(group: Any, weights: Iterator[tuple[str, Tensor]], *, buffer_bytes: int) -> None:
    """Broadcast weights by name to the engines, several in one message."""
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    packed_nccl_broadcast_producer(
        weights,
        group,
        src=0,
        post_iter_func=lambda item: item[1],
        buffer_size_bytes=buffer_bytes,
        num_buffers=NUM_BUFFERS,
    )


def ipc_chunks(weights: Iterator[tuple[str, Tensor]], *, buffer_bytes: int) -> Iterator[dict[str, Any]]:
    """Weights in this GPU's memory, one chunk after another in the same buffer, as engines on this GPU find them.

    An engine must have read a chunk before the next one is asked for.

    Yields:
        Update info of vLLM's "ipc" backend, whose handle is of this GPU alone.
    """
    import torch
    from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    for chunk in packed_ipc_producer(
        weights, str(properties.uuid), post_iter_func=lambda item: item[1], buffer_size_bytes=buffer_bytes
    ):
        yield {
            "names": chunk.names,
            "dtype_names": chunk.dtype_names,
            "shapes": chunk.shapes,
            "ipc_handles": chunk.ipc_handle,
            "tensor_sizes": chunk.tensor_sizes,
        }
