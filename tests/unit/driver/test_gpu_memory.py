"""What ranks and engines keep in a GPU, by hand, and what does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.cli.flags import parse_config
from openrlhf_bd.config import Config
from openrlhf_bd.driver.gpu_memory import Gpu, GpuUse, check_gpu_memory, gpu_uses
from openrlhf_bd.driver.model_files import STUDENT_OPTION, ModelFacts, ModelShape
from openrlhf_bd.driver.node_view import parse_nvidia_smi
from openrlhf_bd.errors import ResourceError

GB = 10**9
TEACHER_OPTION = "--teacher.model_name_or_path"
# A model of 1,000 million numbers: 10 layers of 1,000, with 16 heads of 50, 4 of them for keys, and 3,000 inside.
STUDENT = ModelFacts(
    name="student",
    family="qwen2",
    vocab_size=1_000,
    max_positions=None,
    num_heads=16,
    head_size=50,
    num_parameters=10**9,
    shape=ModelShape(num_layers=10, hidden_size=1_000, query_size=800, key_size=200, feed_forward_size=3_000),
)
MODELS = {STUDENT_OPTION: STUDENT, TEACHER_OPTION: replace(STUDENT, name="teacher", num_parameters=8 * 10**9)}


def uses_of(
    *argv: str, models: dict[str, ModelFacts] = MODELS, stages: tuple[str, ...] = ("generate", "train")
) -> dict[str, GpuUse]:
    base = ["--actor.num_gpus_per_node", "4", "--data.max_len", "500", "--ckpt.output_dir", "/nowhere", *argv]
    config: Config = parse_config(base, prog="openrlhf-bd train", description="Train.")[0]
    needs: Needs = resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill)
    return {use.what: use for use in gpu_uses(config, needs, models, stages=stages)}  # type: ignore[arg-type]


def gpus_of(*sizes_gb: int, used_gb: int = 0) -> list[Gpu]:
    return [Gpu(f"node{place}", "A40", size * GB, used_gb * GB) for place, size in enumerate(sizes_gb)]


def test_parts_of_a_rank() -> None:
    """A rank keeps weights, gradients and optimizer as ZeRO shares them, and slow copies; or offloads some."""
    # bf16 on 4 ranks, ZeRO-2: weights 2 GB; gradients 2 / 4 GB; moments and a copy in fp32, 12 / 4 GB.
    assert uses_of()["student rank"].parts == {"weights": 2 * GB, "gradients": GB // 2, "optimizer": 3 * GB}
    assert uses_of("--ds.adam_offload")["student rank"].num_bytes == 5 * GB // 2
    # An average in fp32: 4 GB on each rank, under ZeRO-3 a quarter of it.
    assert uses_of("--train.enable_ema")["student rank"].parts["averages"] == 4 * GB
    assert uses_of("--train.enable_ema", "--ds.zero_stage", "3")["student rank"].parts["averages"] == GB
    # The teacher of 8 GB numbers in bf16.
    live = uses_of("--algo.distill.kd_ratio", "0.5", "--teacher.dtype", "bfloat16")
    assert live["student rank"].parts["live teacher"] == 16 * GB


def test_activations_of_a_micro_batch() -> None:
    """A layer keeps 4 H + 2 Q + 2 K + 4 F numbers a token; with checkpointing its input, and one layer all, twice."""
    # 4,000 + 1,600 + 400 + 12,000 = 18,000 numbers of 2 bytes; 10 layers; a micro-batch of one row of 500 tokens.
    assert list(uses_of()["student rank"].estimated.items()) == [("activations of 500 tokens", 500 * 10 * 18_000 * 2)]
    more = uses_of("--train.dynamic_batch_enable", "--train.max_tokens_per_gpu", "4000")
    assert list(more["student rank"].estimated.values()) == [4_000 * 10 * 18_000 * 2]
    checkpointing = uses_of("--actor.gradient_checkpointing_enable", "--ds.param_dtype", "fp32")
    assert list(checkpointing["student rank"].estimated.values()) == [500 * (10 * 1_000 + 2 * 18_000) * 4]


def test_parts_of_an_engine() -> None:
    """An engine shares weights and one sequence's cache over its GPUs; float32 checkpoints are loaded in 16 bits."""
    # Keys and values: 2 x 10 layers x 200 numbers x 2 bytes = 8,000 bytes a token.
    teacher = uses_of("--teacher.tensor_parallel_size", "2")["teacher engine (teacher)"]
    assert teacher.parts == {"weights": 8 * GB, "cache of 500 tokens": 500 * 8_000 // 2}
    assert teacher.share == 0.9
    assert uses_of("--teacher.dtype", "float32")["teacher engine (teacher)"].parts["weights"] == 32 * GB
    assert "student engine" not in uses_of()
    assert uses_of("--eval.dataset", "x")["student engine"].parts["weights"] == 2 * GB
    assert set(uses_of(stages=("evaluate",))) == {"student engine"}
    beside = uses_of("--eval.exposure", stages=("evaluate",))["teacher and student side by side"]
    assert beside.parts == {"teacher": 16 * GB, "student": 2 * GB}


def test_models_of_unknown_size_are_left_out() -> None:
    """Where a model's size cannot be known before it is loaded nothing is computed from it."""
    assert uses_of(models={STUDENT_OPTION: replace(STUDENT, num_parameters=None)}) == {}
    assert uses_of(models={STUDENT_OPTION: replace(STUDENT, shape=None)})["student rank"].estimated == {}


def test_what_does_not_fit_is_an_error() -> None:
    """The smallest GPU decides; the message says what is there, what is needed, and which options change it."""
    # Rank 5.5 GB; teacher engine 16 GB + 4 MB within 0.9 of the GPU, so 18 GB hold it and 17 GB do not.
    uses = [*uses_of().values()]
    assert check_gpu_memory(uses, gpus_of(80, 18)) == []
    expected = (
        r"the smallest GPU, A40 of node node1, has 17 GB; teacher engine \(teacher\) needs at least 16 GB within 90% "
        r"of it: weights 16 GB, cache of 500 tokens 4.0 MB. Use a larger --teacher.tensor_parallel_size \(now 1\)"
    )
    with pytest.raises(ResourceError, match=expected):
        check_gpu_memory(uses, gpus_of(80, 17))
    with pytest.raises(
        ResourceError, match=r"has 5.0 GB; student rank needs at least 5.5 GB: .*--ds.zero_stage \(now 2\)"
    ):
        check_gpu_memory([uses_of()["student rank"]], gpus_of(5))


def test_engines_beside_ranks() -> None:
    """An engine on a rank's GPU takes its share beside the rank's state: 0.5 of 11 GB beside 5.5 GB, and not of 10."""
    online = ["--algo.distill.mode", "online", "--train.colocate_all", "--vllm.gpu_memory_utilization", "0.5"]
    engine = uses_of(*online, stages=("train",))["student engine"]
    assert engine.beside == 5 * GB + GB // 2
    assert check_gpu_memory([engine], gpus_of(11)) == []
    with pytest.raises(ResourceError, match=r"takes 50% of it, 5.0 GB, beside a student rank of 5.5 GB. Use a smaller"):
        check_gpu_memory([engine], gpus_of(10))


def test_what_may_not_fit_is_a_warning() -> None:
    """Activations are an estimate: a micro-batch that may be too large is a warning with the options that shrink it."""
    use = uses_of("--train.dynamic_batch_enable", "--train.max_tokens_per_gpu", "20000")["student rank"]
    # 20,000 x 10 x 18,000 x 2 bytes = 7.2 GB and 5.5 GB.
    (warning,) = check_gpu_memory([use], gpus_of(12))
    assert "student rank may need 13 GB: activations of 20,000 tokens" in warning
    assert "--train.max_tokens_per_gpu" in warning
    assert check_gpu_memory([use], gpus_of(13)) == []


def test_memory_that_others_hold_is_a_warning() -> None:
    """A GPU that other processes use by more than a tenth is named with its node."""
    (warning,) = check_gpu_memory([], gpus_of(40, used_gb=6))
    assert warning.startswith("6.0 GB of the 40 GB of A40 of node node0 are taken by other processes")
    assert check_gpu_memory([], gpus_of(40, used_gb=4)) == []


def test_nvidia_smi_is_read() -> None:
    """Names may have commas, sizes are MiB, and GPUs that do not tell their memory are left out."""
    text = "NVIDIA H100 80GB HBM3, 81559, 4\nOdd, name, 1024, 1023\nNVIDIA GB10, [N/A], [N/A]\n"
    assert parse_nvidia_smi(text) == (
        ("NVIDIA H100 80GB HBM3", 81_559 * 2**20, 4 * 2**20),
        ("Odd, name", 2**30, 1023 * 2**20),
    )
