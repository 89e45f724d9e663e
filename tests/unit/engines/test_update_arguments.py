"""Arguments of an engine whose weights change while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, PreTrainedConfig, Qwen2Config

from openrlhf_bd.engines.arguments import Device, UpdateOptions, engine_arguments
from openrlhf_bd.errors import ConfigError

QWEN2 = Qwen2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


def arguments(
    folder: Path, update: UpdateOptions | None, device: Device = "cuda", *, model: PreTrainedConfig = QWEN2
) -> dict[str, Any]:
    model.save_pretrained(folder)
    llm: dict[str, Any] = engine_arguments(
        str(folder), max_model_len=32, max_num_seqs=4, seed=0, update=update, device=device
    )["llm"]
    return llm


def test_each_device_has_its_way_for_weights(tmp_path: Path) -> None:
    """vLLM's own backends on GPUs, ours on CPUs, where every worker must import it; none where weights stay."""
    on_gpu = arguments(tmp_path, UpdateOptions("nccl"))
    on_cpu = arguments(tmp_path, UpdateOptions("gloo"), "cpu")
    assert on_gpu["weight_transfer_config"] == {"backend": "nccl"}
    assert "worker_extension_cls" not in on_gpu
    assert on_cpu["weight_transfer_config"] == {"backend": "gloo"}
    assert on_cpu["worker_extension_cls"] == "openrlhf_bd.engines.gloo_transfer.GlooTransferExtension"
    assert on_cpu["logprobs_mode"] == on_gpu["logprobs_mode"] == "processed_logprobs"
    assert not {"weight_transfer_config", "logprobs_mode"} & arguments(tmp_path, None).keys()


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (4, 8), (16, 16), (17, 32), (400, 512)])
def test_adapters_have_the_smallest_room_that_vllm_knows(rank: int, room: int, tmp_path: Path) -> None:
    """An engine of a LoRA student has room for its rank and for two versions at once; no weights travel to it."""
    llm = arguments(tmp_path, UpdateOptions("nccl", lora_rank=rank))
    assert (llm["enable_lora"], llm["max_lora_rank"], llm["max_loras"]) == (True, room, 2)
    assert "weight_transfer_config" not in llm


def test_only_gpus_sleep(tmp_path: Path) -> None:
    """Sleep mode is for engines that share a GPU; on CPUs it is refused."""
    assert arguments(tmp_path, UpdateOptions("ipc", sleep=True))["enable_sleep_mode"] is True
    with pytest.raises(ConfigError, match="leave sleep mode away"):
        arguments(tmp_path, UpdateOptions("gloo", sleep=True), "cpu")


def test_a_family_without_adapters_in_vllm_is_refused(tmp_path: Path) -> None:
    """vLLM has no adapters for GPT-2, and an engine of one is refused before it starts."""
    with pytest.raises(ConfigError, match="vLLM has no adapters for this family"):
        arguments(tmp_path, UpdateOptions("gloo", lora_rank=4), "cpu", model=GPT2Config(n_embd=64, n_head=2))
