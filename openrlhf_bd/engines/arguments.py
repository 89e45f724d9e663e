"""Arguments of a vLLM engine on CPU and on CUDA: the one place where the two differ.

vLLM itself is not imported here, so that a driver may compute arguments on a machine without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from openrlhf_bd.errors import ConfigError

Device = Literal["cpu", "cuda"]

Transfer = Literal["gloo", "nccl", "ipc"]

RECORDER_EXTENSION = "openrlhf_bd.teacher.recorder.CandidateRecorder"
TRANSFER_EXTENSION = "openrlhf_bd.engines.gloo_transfer.GlooTransferExtension"

# Enough for thousands of short sequences. Where it is not, vLLM preempts and recomputes: slower, never wrong.
CPU_KV_CACHE_LIMIT_BYTES = 2**30
# Tokens of one block of the cache: what its CPU attention likes, and small enough for samples to share a short prompt.
CPU_BLOCK_TOKENS = 32
CPU_BATCHED_TOKENS = 4096
# Sizes of an attention head that vLLM's CPU attention has kernels for (CPUAttentionBackend.get_supported_head_sizes).
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

# Ranks for which vLLM has room for adapters, and adapters that requests of one step may have: the newest, and the one
# before it while its requests finish.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LORA_SLOTS = 2
FAMILIES_WITHOUT_LORA = ("gpt2",)


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """What an engine records about every response token, at temperature 1 and before any change of the logits.

    Attributes:
        top_p: mass p of the candidate sets (Def. 1); None records the tokens' own log-probabilities and no sets.
        always_include: ids that belong to every set.
        logprobs: whether the log-probabilities of the candidates are recorded too.
    """

    top_p: float | None
    always_include: tuple[int, ...] = ()
    logprobs: bool = True


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """How an engine's weights change while it runs.

    Attributes:
        transfer: how they come from the student's ranks: nccl between GPUs, ipc within one, gloo between CPUs.
        lora_rank: rank of the adapters that come instead of weights; 0: weights.
        sleep: the engine can give its GPU's memory to a training step.
    """

    transfer: Transfer
    lora_rank: int = 0
    sleep: bool = False


def default_device() -> Device:
    """CUDA where this process sees a device, else CPU. On a cluster whose head has no GPU, say the device instead."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def engine_arguments(
    model_path: str,
    *,
    max_model_len: int,
    max_num_seqs: int,
    seed: int,
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    enforce_eager: bool = False,
    enable_prefix_caching: bool = True,
    trust_remote_code: bool = False,
    record: RecordOptions | None = None,
    update: UpdateOptions | None = None,
    device: Device | None = None,
) -> dict[str, Any]:
    """Arguments of one engine, for `GenerationEngine`, `TeacherEngine` or `RolloutEngine`.

    Args:
        model_path: folder or hub name of a Hugging Face model.
        max_model_len: longest prompt and response together, tokens. The engine gets one more where the model's
            positions allow it, so that a response cut at the limit can be followed by the set of its last state.
        max_num_seqs: sequences decoded at once.
        seed: of the engine; each request brings its own too.
        dtype: of the weights; "auto" is the checkpoint's own on CUDA and float32 on CPU, where it is fastest.
        tensor_parallel_size: devices of the engine.
        gpu_memory_utilization: share of the GPU's memory for weights and cache; without meaning on CPU, where the
            cache is sized from the model's shape.
        enforce_eager: no CUDA graphs.
        enable_prefix_caching: share the cache of common prefixes.
        trust_remote_code: run Python code that the model folder brings.
        record: what a teacher records; None for an engine that only samples.
        update: how a student's weights change; None for an engine whose weights stay.
        device: where the engine runs; None: CUDA where this process sees it.

    Returns:
        "llm": keyword arguments of `vllm.LLM`; "record" and "update": as given.

    Raises:
        ConfigError: sleep without a GPU, or adapters of a family for which vLLM has none.
        OSError: the model's configuration cannot be read.
    """
    device = device or default_device()
    config = _text_config(model_path, trust_remote_code=trust_remote_code)
    llm: dict[str, Any] = {
        "model": model_path,
        "dtype": "float32" if device == "cpu" and dtype == "auto" else dtype,
        "max_model_len": _engine_length(config, max_model_len),
        "max_num_seqs": max_num_seqs,
        "tensor_parallel_size": tensor_parallel_size,
        # A placement group around the actor would otherwise make vLLM start further Ray actors.
        "distributed_executor_backend": "uni" if tensor_parallel_size == 1 else "mp",
        "enable_prefix_caching": enable_prefix_caching,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
        # Token ids go in and come out; sampling options are always explicit.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if record is not None:
        llm["worker_extension_cls"] = RECORDER_EXTENSION
    if device == "cpu":
        llm |= _cpu_arguments(llm, config)
    else:
        llm |= {"gpu_memory_utilization": gpu_memory_utilization, "enforce_eager": enforce_eager}
        if record is not None:
            # Logits rounded to 16 bits change the size of every tenth candidate set.
            llm["hf_overrides"] = {"head_dtype": "float32"}
    if update is not None:
        llm |= _update_arguments(update, device, family=config.model_type)
    return {"llm": llm, "record": record, "update": update}


def arguments_for_model(arguments: Mapping[str, Any], model_path: str) -> dict[str, Any]:
    """The same engine for another model: only what follows from the model's shape changes.

    Raises:
        OSError: the model's configuration cannot be read.
    """
    llm = {**arguments["llm"], "model": model_path}
    if "kv_cache_memory_bytes" in llm:
        config = _text_config(model_path, trust_remote_code=llm["trust_remote_code"])
        llm["kv_cache_memory_bytes"] = _cpu_kv_cache_bytes(llm, config)
    return {**arguments, "llm": llm}


def engine_environment(model_path: str, *, num_threads: int = 1, device: Device | None = None) -> dict[str, str]:
    """Environment variables of a process that hosts an engine; they must be set before it imports torch.

    Args:
        model_path: the engine's model; a local folder keeps the process off the hub.
        num_threads: CPU threads; several engines on one machine are fastest with one each.
        device: where the engine runs; None: CUDA where this process sees it.
    """
    environment = {
        # The engine lives in the actor's own process: it dies with the actor and holds no socket.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if (device or default_device()) == "cpu":
        environment["TORCHDYNAMO_DISABLE"] = "1"
        # vLLM would give each process of a parallel engine a NUMA node of its own, and fails where there are fewer.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if Path(model_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def stop_token_ids(model_path: str, *, trust_remote_code: bool = False) -> tuple[int, ...]:
    """Ids that end a response: every end-of-sequence id of the model's generation configuration, ascending.

    A model without one falls back to the end-of-sequence id of its configuration; none at all gives ().
    """
    try:
        eos = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:
        eos = None
    if eos is None:
        eos = _text_config(model_path, trust_remote_code=trust_remote_code).eos_token_id
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    return tuple(sorted(set(ids)))


def _text_config(model_path: str, *, trust_remote_code: bool) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    return config.get_text_config()


def _engine_length(config: PretrainedConfig, max_model_len: int) -> int:
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    return max_model_len + 1 if max_model_len + 1 <= positions else max_model_len


def _update_arguments(update: UpdateOptions, device: Device, *, family: str) -> dict[str, Any]:
    # Log-probabilities of the distribution that a token is drawn from: after temperature and nucleus.
    arguments: dict[str, Any] = {"logprobs_mode": "processed_logprobs"}
    if update.sleep and device == "cpu":
        raise ConfigError(
            "an engine that sleeps gives back GPU memory; on CPUs there is none to give: leave sleep mode away"
        )
    if update.sleep:
        arguments["enable_sleep_mode"] = True
    if update.lora_rank > 0 and family in FAMILIES_WITHOUT_LORA:
        raise ConfigError(
            f"--ds.lora.rank {update.lora_rank} with engines that sample from a {family}: vLLM has no adapters for "
            "this family; train all weights (--ds.lora.rank 0), or offline"
        )
    if update.lora_rank > 0:
        rank = next((size for size in LORA_RANKS if size >= update.lora_rank), update.lora_rank)
        return arguments | {"enable_lora": True, "max_lora_rank": rank, "max_loras": LORA_SLOTS}
    arguments["weight_transfer_config"] = {"backend": update.transfer}
    if update.transfer == "gloo":
        arguments["worker_extension_cls"] = TRANSFER_EXTENSION
    return arguments


def _cpu_arguments(llm: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    return {
        "enforce_eager": True,
        "block_size": CPU_BLOCK_TOKENS,
        "kv_cache_memory_bytes": _cpu_kv_cache_bytes(llm, config),
        # A prompt that is split over steps draws and takes back a sample; vLLM cannot take one back from a CPU
        # generator with a seed of its own (torch.Generator.get_offset), and fails.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, llm["max_model_len"], llm["max_num_seqs"]),
    }


def _cpu_kv_cache_bytes(llm: Mapping[str, Any], config: PretrainedConfig) -> int:
    """Room for every sequence at its longest, at most CPU_KV_CACHE_LIMIT_BYTES, at least one sequence."""
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    value_bytes = 4 if llm["dtype"] == "float32" else 2
    token_bytes = 2 * config.num_hidden_layers * num_kv_heads * head_size * value_bytes
    sequence_blocks = math.ceil(llm["max_model_len"] / CPU_BLOCK_TOKENS)
    block_bytes = CPU_BLOCK_TOKENS * token_bytes
    # vLLM keeps one block for itself.
    smallest = (sequence_blocks + 1) * block_bytes
    wanted = (llm["max_num_seqs"] * sequence_blocks + 1) * block_bytes
    return max(smallest, min(wanted, CPU_KV_CACHE_LIMIT_BYTES))
