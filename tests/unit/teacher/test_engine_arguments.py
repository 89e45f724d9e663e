"""`engines.arguments`: what an engine is started with on CPU and on CUDA."""

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from openrlhf_bd.engines.arguments import (
    CPU_HEAD_SIZES,
    RECORDER_EXTENSION,
    RecordOptions,
    arguments_for_model,
    engine_arguments,
    engine_environment,
    stop_token_ids,
)

LAYERS, KV_HEADS, HEAD_SIZE, POSITIONS = 3, 2, 32, 512
# Keys and values, float32.
TOKEN_BYTES = 2 * LAYERS * KV_HEADS * HEAD_SIZE * 4
BLOCK_BYTES = 32 * TOKEN_BYTES


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_config(tmp_path / "model", {})


def write_config(folder: Path, changes: dict[str, Any]) -> str:
    shape = {
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": POSITIONS,
        "eos_token_id": 5,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape | changes), encoding="utf-8")
    return str(folder)


def arguments(model: str, **options: Any) -> dict[str, Any]:
    shape: dict[str, Any] = {"max_model_len": 100, "max_num_seqs": 8, "seed": 1, "device": "cpu"}
    return engine_arguments(model, **(shape | options))


def test_cpu_engine_is_float32_and_eager_with_a_cache_for_all_its_sequences(model: str) -> None:
    """On CPU "auto" means float32, no graphs, and a KV cache of the size that the sequences need."""
    llm = arguments(model)["llm"]
    assert (llm["dtype"], llm["enforce_eager"]) == ("float32", True)
    # 101 tokens are 4 blocks of 32; 8 sequences and the block that vLLM keeps for itself.
    assert llm["kv_cache_memory_bytes"] == (8 * 4 + 1) * BLOCK_BYTES
    assert arguments(model, dtype="bfloat16")["llm"]["kv_cache_memory_bytes"] == (8 * 4 + 1) * BLOCK_BYTES // 2


def test_cpu_cache_is_bounded(model: str) -> None:
    """Thousands of sequences do not reserve more than the limit: vLLM preempts instead."""
    assert arguments(model, max_num_seqs=100_000)["llm"]["kv_cache_memory_bytes"] == 2**30


def test_cuda_teacher_computes_logits_in_float32(model: str) -> None:
    """A recording engine on CUDA keeps the checkpoint's type but for the output embedding; a plain one keeps all."""
    teacher = arguments(model, device="cuda", record=RecordOptions(top_p=0.9))
    assert teacher["llm"]["dtype"] == "auto"
    assert teacher["llm"]["hf_overrides"] == {"head_dtype": "float32"}
    assert teacher["llm"]["worker_extension_cls"] == RECORDER_EXTENSION
    assert "kv_cache_memory_bytes" not in teacher["llm"]
    student = arguments(model, device="cuda")["llm"]
    assert not {"hf_overrides", "worker_extension_cls"} & student.keys()


def test_engine_has_room_for_the_state_after_a_cut_response(model: str) -> None:
    """The engine takes one token more than prompt and response, unless the model has no position for it."""
    assert arguments(model, max_model_len=POSITIONS - 1)["llm"]["max_model_len"] == POSITIONS
    assert arguments(model, max_model_len=POSITIONS)["llm"]["max_model_len"] == POSITIONS


def test_other_model_gets_a_cache_of_its_own_shape(model: str, tmp_path: Path) -> None:
    """`arguments_for_model` changes the model and, on CPU, the size of the cache; nothing else."""
    before = arguments(model, record=RecordOptions(top_p=0.9))
    larger = write_config(tmp_path / "larger", {"num_hidden_layers": 2 * LAYERS})
    after = arguments_for_model(before, larger)
    assert after["llm"]["kv_cache_memory_bytes"] == 2 * before["llm"]["kv_cache_memory_bytes"]
    changed = {key for key in before["llm"] if before["llm"][key] != after["llm"][key]}
    assert changed == {"model", "kv_cache_memory_bytes"}
    assert after["record"] == before["record"]


def test_all_end_of_sequence_ids_stop_a_response(model: str) -> None:
    """The generation configuration's ids count, one or several; without it the model's own."""
    assert stop_token_ids(model) == (5,)
    for eos, expected in (([9, 4], (4, 9)), (7, (7,))):
        content = json.dumps({"eos_token_id": eos})
        (Path(model) / "generation_config.json").write_text(content, encoding="utf-8")
        assert stop_token_ids(model) == expected


def test_local_model_keeps_the_engine_off_the_hub(model: str) -> None:
    """The environment goes offline for a folder and stays online for a hub name; values are strings."""
    assert engine_environment(model)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in engine_environment("some-organisation/some-model")
    assert all(isinstance(value, str) for value in engine_environment(model, num_threads=2).values())


def test_parallel_engines_on_cpus_need_no_numa_node_for_each_process(model: str) -> None:
    """vLLM binds no threads on CPUs, where it would want as many NUMA nodes as an engine has processes."""
    assert engine_environment(model, device="cpu")["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in engine_environment(model, device="cuda")


def test_head_sizes_are_those_of_the_installed_vllm() -> None:
    """The head sizes that pass the checks are exactly those that vLLM's CPU attention names."""
    # Read, not imported: its import takes longer than all tests here.
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parent / "v1/attention/backends/cpu_attn.py").read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    (function,) = [node for node in functions if node.name == "get_supported_head_sizes"]
    statement = function.body[-1]
    assert isinstance(statement, ast.Return)
    assert list(CPU_HEAD_SIZES) == ast.literal_eval(statement.value or ast.Constant(None))
