"""vLLM engines as the driver starts them: the teacher's, and those that sample from a student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.driver.cluster import cluster_device, placed, wait_for
from openrlhf_bd.driver.progress import console
from openrlhf_bd.engines.actor import GenerationEngine
from openrlhf_bd.engines.arguments import RecordOptions, engine_arguments, engine_environment
from openrlhf_bd.teacher.engine import TeacherEngine


class EngineActors:
    """Actors that host one engine each, and can take each other's places.

    Args:
        start: starts the actor of a place, 0 to num_engines - 1.
        num_engines: actors.

    Attributes:
        handles: the actors, by place.
    """

    def __init__(self, start: Callable[[int], Any], num_engines: int) -> None:
        self._start = start
        self.handles = [start(place) for place in range(num_engines)]

    def replace(self, handle: Any) -> Any:
        """End an actor, whatever state it is in, and start another in its place.

        Returns:
            The new handle; its `ready()` answers once it can work.
        """
        place = self.handles.index(handle)
        ray.kill(handle)
        self.handles[place] = self._start(place)
        return self.handles[place]

    def end(self) -> None:
        """End all of them."""
        for handle in self.handles:
            ray.kill(handle)


@contextmanager
def teacher_engines(config: Config, *, model: str, record: RecordOptions, num_engines: int) -> Iterator[EngineActors]:
    """Engines that host a teacher and record what the rows need.

    Args:
        config: `teacher.*`.
        model: folder or hub name of the teacher.
        record: candidate sets to record; top_p None records the tokens' own log-probabilities alone.
        num_engines: engines to start.
    """
    device = cluster_device()
    arguments = engine_arguments(
        model,
        max_model_len=teacher_length(config),
        max_num_seqs=config.teacher.max_num_seqs,
        seed=config.train.seed,
        dtype=config.teacher.dtype,
        tensor_parallel_size=config.teacher.tensor_parallel_size,
        gpu_memory_utilization=config.teacher.gpu_memory_utilization,
        enforce_eager=config.teacher.enforce_eager,
        enable_prefix_caching=config.teacher.enable_prefix_caching,
        trust_remote_code=config.trust_remote_code,
        record=record,
        device=device,
    )
    with engine_actors(
        TeacherEngine,
        arguments,
        num_engines=num_engines,
        gpus_per_engine=config.teacher.tensor_parallel_size,
        environment=engine_environment(model, device=device),
        timeout_s=config.cluster.start_timeout_s,
        what="the teacher's engines",
    ) as engines:
        yield engines


@contextmanager
def student_engines(config: Config, *, model: str) -> Iterator[list[Any]]:
    """Engines that sample from a student; `load` gives them other weights.

    Args:
        config: `vllm.*`.
        model: folder or hub name of the first student.
    """
    device = cluster_device()
    arguments = engine_arguments(
        model,
        max_model_len=config.data.max_len,
        max_num_seqs=config.teacher.max_num_seqs,
        seed=config.train.seed,
        tensor_parallel_size=config.vllm.tensor_parallel_size,
        gpu_memory_utilization=config.vllm.gpu_memory_utilization,
        enforce_eager=config.vllm.enforce_eager,
        enable_prefix_caching=config.vllm.enable_prefix_caching,
        trust_remote_code=config.trust_remote_code,
        device=device,
    )
    with engine_actors(
        GenerationEngine,
        arguments,
        num_engines=config.vllm.num_engines or 1,
        gpus_per_engine=config.vllm.tensor_parallel_size,
        environment=engine_environment(model, device=device),
        timeout_s=config.cluster.start_timeout_s,
        what="the student's engines",
    ) as engines:
        yield engines.handles


@contextmanager
def engine_actors(
    actor_class: type,
    arguments: dict[str, Any],
    *,
    num_engines: int,
    gpus_per_engine: int,
    environment: dict[str, str],
    timeout_s: float,
    what: str,
) -> Iterator[EngineActors]:
    """Actors that host one vLLM engine each, ended with the block.

    Args:
        actor_class: plain class, wrapped here; constructed with `arguments`, answers `ready()` once it can work.
        arguments: the engine's arguments.
        num_engines: actors.
        gpus_per_engine: GPUs of each.
        environment: environment variables of the actors' processes.
        timeout_s: longest wait for room, and for the engines to start.
        what: name of the engines in messages.
    """
    remote_class: Any = ray.remote(max_restarts=0, max_task_retries=0)(actor_class)
    bundles = [{"CPU": 1.0, "GPU": float(gpus_per_engine)}] * num_engines
    with placed(bundles, timeout_s=timeout_s, what=what) as group:

        def start(place: int) -> Any:
            return remote_class.options(
                num_cpus=1,
                num_gpus=gpus_per_engine,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place),
            ).remote(arguments)

        console.print(f"[dim]starting {what}: {num_engines}[/dim]", highlight=False)
        actors = EngineActors(start, num_engines)
        try:
            wait_for([actor.ready.remote() for actor in actors.handles], timeout_s=timeout_s, what=f"{what} to start")
            yield actors
        finally:
            actors.end()
