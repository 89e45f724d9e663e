"""What the stages of a job ask of the machines: actors, GPUs, CPUs and disk space, against what there is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.config import Config
from openrlhf_bd.driver.model_files import ModelFacts
from openrlhf_bd.driver.plan import ActorGroup
from openrlhf_bd.errors import ResourceError

Stage = Literal["generate", "train", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_PARAMETER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# fp32 weights and the two moments of Adam, beside the parameters themselves.
_OPTIMIZER_BYTES = 12
_AVERAGE_BYTES = 4


def takes_part(stage: Stage, config: Config, needs: Needs) -> bool:
    """Whether a job has a stage: own responses need no teacher, and without test sets there is nothing to evaluate."""
    if stage == "generate":
        return needs.rollouts == "teacher"
    return stage == "train" or config.eval.test_datasets is not None


def stage_actors(config: Config, stage: Stage) -> tuple[ActorGroup, ...]:
    """Actors that a stage starts, one GPU each rank and `tensor_parallel_size` GPUs each engine."""
    actor, teacher, vllm = config.actor, config.teacher, config.vllm
    teacher_size = f"--teacher.tensor_parallel_size {teacher.tensor_parallel_size}"
    engines = ActorGroup(
        "student engines",
        vllm.num_engines or 1,
        vllm.tensor_parallel_size,
        f"--vllm.num_engines {vllm.num_engines or 1} x --vllm.tensor_parallel_size {vllm.tensor_parallel_size}",
    )
    if stage == "generate":
        flags = f"--teacher.num_engines {teacher.num_engines} x {teacher_size}"
        return (ActorGroup("teacher engines", teacher.num_engines, teacher.tensor_parallel_size, flags),)
    if stage == "train":
        flags = f"--actor.num_nodes {actor.num_nodes} x --actor.num_gpus_per_node {actor.num_gpus_per_node}"
        ranks = ActorGroup("student ranks", actor.num_nodes * actor.num_gpus_per_node, 1, flags)
        return (ranks, engines) if config.eval.dataset else (ranks,)
    scorer = ActorGroup("teacher engines", 1, teacher.tensor_parallel_size, f"--eval.teacher_nll, {teacher_size}")
    return (engines, scorer) if config.eval.teacher_nll else (engines,)


def check_cluster(config: Config, cluster_resources: Mapping[str, float], *, stages: Sequence[Stage] = STAGES) -> None:
    """Compare what each stage needs with what a Ray cluster has.

    Args:
        config: the job.
        cluster_resources: `ray.cluster_resources()`.
        stages: see `preflight`.

    Raises:
        ResourceError: a stage needs more GPUs or CPUs than there are; the message names the flags that asked.
    """
    needs = resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill)
    for stage in stages:
        if not takes_part(stage, config, needs):
            continue
        groups = stage_actors(config, stage)
        wanted = {
            "GPU": [(group.num_gpus, group) for group in groups],
            "CPU": [(group.num_actors, group) for group in groups],
        }
        for kind, parts in wanted.items():
            total, available = sum(count for count, _ in parts), int(cluster_resources.get(kind, 0))
            if total > available:
                listed = "; ".join(f"{count} for {group.what} ({group.flags})" for count, group in parts)
                raise ResourceError(
                    f"the Ray cluster has {available} {kind}s, stage {stage} needs {total}: {listed}. Lower these "
                    "options or add nodes (on machines without GPUs: ray start --num-gpus N, where N is only a number)"
                )


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Free disk space where the path is or would be."""
    return shutil.disk_usage(existing_parent(path)).free


def student_bytes(config: Config, student: ModelFacts | None) -> int:
    """Disk space of checkpoints and students; 0 where the student's size is not known.

    A new checkpoint is whole before an old one goes, so there is one more than are kept.
    """
    if student is None or student.num_parameters is None:
        return 0
    weights = student.num_parameters * _PARAMETER_BYTES[config.ds.param_dtype]
    copies = 3 if config.eval.dataset else 2
    if config.ckpt.disable_ds or config.ckpt.save_steps < 0:
        return copies * weights
    num_averages = config.train.enable_ema + (config.algo.distill.next_value_gradient == "target")
    # Of adapters all this is little.
    trained = student.num_parameters if config.ds.lora.rank == 0 else 0
    checkpoint = weights + trained * (_OPTIMIZER_BYTES + num_averages * _AVERAGE_BYTES)
    kept = min(config.ckpt.max_num * checkpoint, config.ckpt.max_mem * 1e9)
    return int(copies * weights + kept + checkpoint)
