"""What each actor of a job keeps in its GPU, and whether it fits: computed before anything is loaded.

Two kinds of numbers: those that are certain (weights, gradients, optimizer, one sequence's cache) end a job that cannot
have them; an estimate (activations) only warns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.driver.model_files import STUDENT_OPTION, ModelFacts
from openrlhf_bd.driver.rank_memory import AVERAGE_BYTES, rank_parts
from openrlhf_bd.driver.resources import Stage, holds_teacher, makes_rows
from openrlhf_bd.driver.selection import validates_by_sampling
from openrlhf_bd.errors import ResourceError
from openrlhf_bd.paths import format_bytes

# Bytes of a parameter. vLLM loads float32 checkpoints in 16 bits on GPUs, unless it is told a type; elsewhere auto is
# the checkpoint's own type, so that this is the least.
_LEAST_BYTES = {"auto": 2, "float32": 4, "bfloat16": 2, "float16": 2}
_CACHE_BYTES = 2
_KEYS_AND_VALUES = 2
_TEACHER_OPTION = "--teacher.model_name_or_path"


@dataclass(frozen=True, slots=True)
class GpuUse:
    """What one actor keeps in each of its GPUs.

    Attributes:
        what: name in messages, "student rank".
        parts: bytes by name, each certain.
        estimated: further bytes by name that depend on kernels and lengths.
        share: of the GPU that it may take.
        flags: options that change it, for messages.
        beside: bytes of another actor on the same GPU at the same time.
    """

    what: str
    parts: Mapping[str, int]
    estimated: Mapping[str, int]
    share: float
    flags: str
    beside: int = 0

    @property
    def num_bytes(self) -> int:
        """Of the parts that are certain."""
        return sum(self.parts.values())

    def line(self) -> str:
        """For the plan: the sum, and what it consists of."""
        shown = [f"{name} {format_bytes(size)}" for name, size in self.parts.items() if size]
        shown += [f"{name} about {format_bytes(size)}" for name, size in self.estimated.items()]
        total = format_bytes(self.num_bytes + sum(self.estimated.values()))
        limit = f", at most {self.share:.0%} of it" if self.share < 1 else ""
        return f"GPU memory: {self.what} {total}{limit}: {', '.join(shown)}"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of the cluster.

    Attributes:
        node: name of its node.
        name: of the device.
        total_bytes: its memory.
        used_bytes: of it, now.
    """

    node: str
    name: str
    total_bytes: int
    used_bytes: int


def gpu_uses(
    config: Config, needs: Needs, models: Mapping[str, ModelFacts], *, stages: Sequence[Stage]
) -> tuple[GpuUse, ...]:
    """Memory of ranks and engines, of those whose model's size is known.

    Args:
        config: the job.
        needs: of its algorithm.
        models: facts of its models, by the option that names each.
        stages: that take part.
    """
    student = models.get(STUDENT_OPTION)
    teachers = {option: facts for option, facts in models.items() if option.startswith("--teacher.")}
    uses: list[GpuUse | None] = []
    rank = None
    teacher = teachers.get(_TEACHER_OPTION)
    if "train" in stages:
        rank = _rank(config, needs, student, teacher)
        uses.append(rank)
    if makes_rows(config, stages) or ("evaluate" in stages and config.eval.teacher_nll):
        uses += [_teacher_engine(config, facts, option) for option, facts in teachers.items()]
    online = config.algo.distill.mode != "offline" and needs.student_samples(config.algo.distill)
    if "evaluate" in stages or ("train" in stages and (online or validates_by_sampling(config))):
        uses.append(_student_engine(config, student, rank if config.train.colocate_all else None))
    if "evaluate" in stages and config.eval.exposure:
        uses.append(_side_by_side(config, teacher, student))
    return tuple(use for use in uses if use is not None)


def activation_bytes(config: Config, student: ModelFacts | None) -> int | None:
    """Activations of the largest micro-batch, an estimate; None where the student's shape is not known.

    A layer keeps, per token, its inputs, those of its norms, queries, keys, values, what attention and feed-forward
    layer make of them: 4 H + 2 Q + 2 K + 4 F numbers (Korthikanti et al. 2022, section 4.1, without the attention
    matrix, which fused kernels do not keep, and without dropout). With gradient checkpointing every layer keeps its
    input alone, and one layer at a time all of it, once more for its gradients.
    """
    if student is None or student.shape is None:
        return None
    shape = student.shape
    value_bytes = 4 if config.ds.param_dtype == "fp32" else 2
    layer = 4 * shape.hidden_size + 2 * shape.query_size + 2 * shape.key_size + 4 * shape.feed_forward_size
    if config.actor.gradient_checkpointing_enable:
        numbers = shape.num_layers * shape.hidden_size + 2 * layer
    else:
        numbers = shape.num_layers * layer
    return micro_batch_tokens(config) * numbers * value_bytes


def micro_batch_tokens(config: Config) -> int:
    """Tokens of the largest micro-batch."""
    if config.train.dynamic_batch_enable:
        return config.train.max_tokens_per_gpu
    return config.train.micro_batch_size * config.data.max_len


def _rank(config: Config, needs: Needs, student: ModelFacts | None, teacher: ModelFacts | None) -> GpuUse | None:
    parts = rank_parts(config, student)
    if parts is None or student is None or student.num_parameters is None:
        return None
    num_ranks = config.actor.num_nodes * config.actor.num_gpus_per_node
    if config.ds.adam_offload:
        parts["optimizer"] = 0
    num_averages = config.train.enable_ema + needs.target_network
    if num_averages and config.ds.lora.rank == 0:
        shared = num_ranks if config.ds.zero_stage == 3 else 1
        parts["averages"] = num_averages * AVERAGE_BYTES * student.num_parameters // shared
    if holds_teacher(config, ["train"]) and teacher is not None and teacher.num_parameters is not None:
        parts["live teacher"] = teacher.num_parameters * _LEAST_BYTES[config.teacher.dtype]
    activations = activation_bytes(config, student)
    tokens = f"activations of {micro_batch_tokens(config):,} tokens"
    return GpuUse(
        "student rank",
        parts,
        {} if activations is None else {tokens: activations},
        1.0,
        f"more ranks (--actor.num_nodes {config.actor.num_nodes}, --actor.num_gpus_per_node "
        f"{config.actor.num_gpus_per_node}), a higher --ds.zero_stage (now {config.ds.zero_stage}), "
        "--ds.adam_offload, --ds.lora.rank",
    )


def _teacher_engine(config: Config, teacher: ModelFacts, option: str) -> GpuUse | None:
    options = config.teacher
    return _engine(
        f"teacher engine ({teacher.name})",
        teacher,
        dtype=options.dtype,
        parallel=options.tensor_parallel_size,
        max_len=teacher_length(config),
        share=options.gpu_memory_utilization,
        flags=f"a larger --teacher.tensor_parallel_size (now {options.tensor_parallel_size}), a larger "
        f"--teacher.gpu_memory_utilization (now {options.gpu_memory_utilization:g}), --teacher.dtype bfloat16, "
        f"another {option}",
    )


def _student_engine(config: Config, student: ModelFacts | None, rank: GpuUse | None) -> GpuUse | None:
    options = config.vllm
    return _engine(
        "student engine",
        student,
        dtype="auto",
        parallel=options.tensor_parallel_size,
        max_len=config.data.max_len,
        share=options.gpu_memory_utilization,
        flags=f"--vllm.gpu_memory_utilization (now {options.gpu_memory_utilization:g}), --vllm.tensor_parallel_size "
        f"(now {options.tensor_parallel_size})" + (", --train.colocate_all false" if rank is not None else ""),
        beside=0 if rank is None else rank.num_bytes,
    )


def _side_by_side(config: Config, teacher: ModelFacts | None, student: ModelFacts | None) -> GpuUse | None:
    if teacher is None or student is None or teacher.num_parameters is None or student.num_parameters is None:
        return None
    parts = {
        "teacher": teacher.num_parameters * _LEAST_BYTES[config.teacher.dtype],
        "student": student.num_parameters * _LEAST_BYTES["auto"],
    }
    return GpuUse("teacher and student side by side", parts, {}, 1.0, "--eval.exposure false")


def _engine(
    what: str,
    model: ModelFacts | None,
    *,
    dtype: str,
    parallel: int,
    max_len: int,
    share: float,
    flags: str,
    beside: int = 0,
) -> GpuUse | None:
    """Weights, shared over the engine's GPUs, and the cache of one sequence at its longest, without which none runs."""
    if model is None or model.num_parameters is None:
        return None
    parts = {"weights": model.num_parameters * _LEAST_BYTES[dtype] // parallel}
    if model.shape is not None:
        token_bytes = _KEYS_AND_VALUES * model.shape.num_layers * model.shape.key_size * _CACHE_BYTES
        parts[f"cache of {max_len:,} tokens"] = max_len * token_bytes // parallel
    return GpuUse(what, parts, {}, share, flags, beside)


def check_gpu_memory(uses: Sequence[GpuUse], gpus: Sequence[Gpu]) -> list[str]:
    """Compare what actors keep with the smallest GPU of a cluster: Ray may place any of them there.

    Args:
        uses: of the job's actors.
        gpus: of the cluster, at least one.

    Returns:
        Warnings: what fits only if the estimates are too high, and GPUs in which others keep something.

    Raises:
        ResourceError: what is certain does not fit; the message says by how much, and what to change.
    """
    smallest = min(gpus, key=lambda gpu: gpu.total_bytes)
    place = f"the smallest GPU, {smallest.name} of node {smallest.node}, has {format_bytes(smallest.total_bytes)}"
    warnings = []
    for use in uses:
        limit = smallest.total_bytes * use.share
        if use.num_bytes > limit:
            raise ResourceError(f"{place}; {_needs(use)}. Use {use.flags}, or larger GPUs")
        if use.beside + limit > smallest.total_bytes and use.beside:
            raise ResourceError(
                f"{place}; {use.what} takes {use.share:.0%} of it, {format_bytes(limit)}, beside a student rank of "
                f"{format_bytes(use.beside)}. Use a smaller {use.flags}, or larger GPUs"
            )
        estimated = use.num_bytes + sum(use.estimated.values())
        if estimated > limit:
            warnings.append(
                f"{place}; {use.what} may need {format_bytes(estimated)}: {', '.join(use.estimated)}; if memory runs "
                "out, lower --train.max_tokens_per_gpu or --train.micro_batch_size, or use "
                "--actor.gradient_checkpointing_enable"
            )
    return warnings + _taken(gpus)


def _needs(use: GpuUse) -> str:
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in use.parts.items() if size)
    share = f" within {use.share:.0%} of it" if use.share < 1 else ""
    return f"{use.what} needs at least {format_bytes(use.num_bytes)}{share}: {parts}"


def _taken(gpus: Sequence[Gpu]) -> list[str]:
    """A line for each node whose GPUs hold something, which vLLM counts against its share."""
    return [
        f"{format_bytes(gpu.used_bytes)} of the {format_bytes(gpu.total_bytes)} of {gpu.name} of node {gpu.node} "
        "are taken by other processes; see nvidia-smi there"
        for gpu in gpus
        if gpu.used_bytes > gpu.total_bytes // 10
    ]
