"""Broadcast of packed weights between processes' ends of a group, here threads of one process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from openrlhf_bd.engines.gloo_group import GlooGroup, meeting_place, num_bytes, pack, unpack

TIMEOUT_S = 20.0


def test_packed_tensors_come_back_as_they_were() -> None:
    """Tensors of several types and shapes, also where one starts at an odd byte, survive packing bit by bit."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(3, 5, generator=generator).to(torch.bfloat16),  # 30 bytes: what follows is not at a multiple of 4
        torch.randn(2, 4, generator=generator).T,
        torch.randn((), generator=generator),
        torch.randn(7, generator=generator).to(torch.float16),
    ]
    packed = pack(tensors)
    shapes, dtypes = [tuple(tensor.shape) for tensor in tensors], [tensor.dtype for tensor in tensors]
    # 15 x 2 + 8 x 4 + 4 + 7 x 2 bytes.
    assert (packed.dtype, packed.numel()) == (torch.uint8, 80)
    assert sum(num_bytes(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)) == 80
    for found, expected in zip(unpack(packed, shapes, dtypes), tensors, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_every_member_gets_what_the_first_one_sends() -> None:
    """Member 0's tensor reaches two others, again and again."""
    store = meeting_place("127.0.0.1", 0, is_sender=True, timeout_s=TIMEOUT_S)

    def take_part(rank: int) -> list[Tensor]:
        place = store if rank == 0 else meeting_place("127.0.0.1", store.port, is_sender=False, timeout_s=TIMEOUT_S)
        group = GlooGroup(place, rank=rank, size=3, timeout_s=TIMEOUT_S)
        found = []
        for sent in (torch.arange(10, dtype=torch.uint8), torch.full((100_000,), 7, dtype=torch.uint8)):
            tensor = sent.clone() if rank == 0 else torch.zeros_like(sent)
            group.broadcast(tensor)
            found.append(tensor)
        return found

    with ThreadPoolExecutor(3) as threads:
        for first, second in threads.map(take_part, range(3)):
            assert first.tolist() == list(range(10))
            assert bool((second == 7).all())


def test_a_member_that_does_not_come_ends_the_wait() -> None:
    """A group that one member of two does not join is an error after the limit, not a hang."""
    store = meeting_place("127.0.0.1", 0, is_sender=True, timeout_s=0.5)
    with pytest.raises(RuntimeError):
        GlooGroup(store, rank=0, size=2, timeout_s=0.5)
