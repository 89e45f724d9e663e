"""What the stages of a job ask of the machines: actors, GPUs, CPUs and disk space, against what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.config import Config
from openrlhf_bd.driver.plan import ActorGroup
from openrlhf_bd.driver.selection import validates_by_sampling
from openrlhf_bd.errors import ResourceError

Stage = Literal["generate", "train", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
STUDENT_ENGINES = "student engines"


def takes_part(stage: Stage, config: Config, needs: Needs) -> bool:
    """Whether a job has a stage: some algorithms need no row of the teacher's, and without test sets nothing is
    evaluated.
    """
    if stage == "generate":
        return needs.rows_by_teacher and config.algo.distill.mode != "online"
    return stage == "train" or config.eval.test_datasets is not None


def makes_rows(config: Config, stages: Sequence[Stage]) -> bool:
    """Whether the teacher makes rows in one of these stages, before or while the student trains."""
    return "generate" in stages or ("train" in stages and config.algo.distill.mode != "offline")


def holds_teacher(config: Config, stages: Sequence[Stage]) -> bool:
    """Whether the student's ranks hold the teacher."""
    needs = resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill)
    return "train" in stages and (config.algo.distill.kd_ratio > 0 or needs.live_teacher)


def stage_actors(config: Config, stage: Stage) -> tuple[ActorGroup, ...]:
    """Actors that a stage starts, one GPU each rank and `tensor_parallel_size` GPUs each engine."""
    actor, teacher, vllm = config.actor, config.teacher, config.vllm
    teacher_size = f"--teacher.tensor_parallel_size {teacher.tensor_parallel_size}"
    engines = ActorGroup(
        STUDENT_ENGINES,
        vllm.num_engines or 1,
        # On the ranks' own.
        0 if stage == "train" and config.train.colocate_all else vllm.tensor_parallel_size,
        f"--vllm.num_engines {vllm.num_engines or 1} x --vllm.tensor_parallel_size {vllm.tensor_parallel_size}",
    )
    flags = f"--teacher.num_engines {teacher.num_engines} x {teacher_size}"
    teachers = ActorGroup("teacher engines", teacher.num_engines, teacher.tensor_parallel_size, flags)
    is_remote = teacher.api_base is not None
    if is_remote:
        flags = f"--teacher.num_engines {teacher.num_engines}, --teacher.api_base"
        teachers = ActorGroup("teacher clients", teacher.num_engines, 0, flags)
    if stage == "generate":
        return (teachers,)
    if stage == "train":
        flags = f"--actor.num_nodes {actor.num_nodes} x --actor.num_gpus_per_node {actor.num_gpus_per_node}"
        ranks = ActorGroup("student ranks", actor.num_nodes * actor.num_gpus_per_node, 1, flags)
        online = config.algo.distill.mode != "offline"
        needs = resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill)
        samples = online and needs.student_samples(config.algo.distill)
        return (
            ranks,
            *((teachers,) if online else ()),
            *((engines,) if samples or validates_by_sampling(config) else ()),
        )
    scorer = ActorGroup("teacher engines", 1, teacher.tensor_parallel_size, f"--eval.teacher_nll, {teacher_size}")
    if is_remote:
        scorer = ActorGroup("teacher clients", 1, 0, "--eval.teacher_nll, --teacher.api_base")
    beside = ActorGroup("teacher and student side by side", 1, 1, "--eval.exposure")
    return (
        engines,
        *((scorer,) if config.eval.teacher_nll else ()),
        *((beside,) if config.eval.exposure else ()),
    )


def stage_gpus(config: Config, stage: Stage) -> int:
    """GPUs that a stage holds while it runs."""
    return sum(group.num_gpus for group in stage_actors(config, stage))


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
