"""vLLM engines as the driver starts them: the teacher's, and those that sample from a student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.driver.cluster import cluster_device, placed
from openrlhf_bd.driver.progress import console
from openrlhf_bd.driver.remote_teacher import is_remote, remote_options
from openrlhf_bd.driver.timeline import collected, driver_span
from openrlhf_bd.engines.actor import GenerationEngine
from openrlhf_bd.engines.arguments import (
    Device,
    RecordOptions,
    Transfer,
    UpdateOptions,
    engine_arguments,
    engine_environment,
)
from openrlhf_bd.evaluation.timeline import STUDENT, TEACHER
from openrlhf_bd.rollout.calls import CONTROL, CONTROL_CALLS, control, wait_for
from openrlhf_bd.rollout.sampler import StudentSampler
from openrlhf_bd.rollout.weights import AdapterSync, EngineSync, Ranks, WeightSync
from openrlhf_bd.teacher.engine import TeacherEngine
from openrlhf_bd.teacher.remote import RemoteTeacher

# Calls of an engine that wait for responses at once; further ones wait outside.
ENGINE_CALLS = 16
# Engines that do not shut down by themselves are ended after so many seconds.
SHUTDOWN_TIMEOUT_S = 30.0


# Of a GPU that engines share with ranks, as OpenRLHF has it: only Ray's bookkeeping, no limit of memory.
GPU_SHARE = 0.2
# In a run's folder: adapters on their way to the engines.
ADAPTERS_FOLDER = "adapters"


class EngineActors:
    """Actors that host one engine each, and can take each other's places.

    Args:
        start: starts the actor of a place, 0 to num_engines - 1.
        num_engines: actors.
        have_children: each engine has worker processes of its own.

    Attributes:
        handles: the actors, by place.
    """

    def __init__(self, start: Callable[[int], Any], num_engines: int, *, have_children: bool) -> None:
        self._start, self._have_children = start, have_children
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
        """End all of them.

        Ray ends the processes of an actor's children with it, but shared memory between them stays behind unless vLLM
        shuts them down itself: those that answer may do so.
        """
        if self._have_children:
            refs = [handle.shutdown.remote() for handle in self.handles]
            ray.wait(refs, num_returns=len(refs), timeout=SHUTDOWN_TIMEOUT_S)
        for handle in self.handles:
            ray.kill(handle)


@contextmanager
def teacher_engines(config: Config, *, model: str, record: RecordOptions, num_engines: int) -> Iterator[EngineActors]:
    """Engines that host a teacher and record what the rows need, or clients of the server that does.

    Args:
        config: `teacher.*`.
        model: folder or hub name of the teacher; of no meaning where a server hosts it.
        record: candidate sets to record; top_p None records the tokens' own log-probabilities alone.
        num_engines: engines to start.
    """
    if is_remote(config):
        with engine_actors(
            RemoteTeacher,
            remote_options(config, record),
            num_engines=num_engines,
            gpus_per_engine=0,
            environment={"OMP_NUM_THREADS": "1"},
            timeout_s=config.cluster.start_timeout_s,
            what="the teacher's clients",
            lane=TEACHER,
        ) as engines:
            yield engines
        return
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
        lane=TEACHER,
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
    with engine_actors(
        GenerationEngine,
        _student_arguments(config, model, device, update=None),
        num_engines=config.vllm.num_engines or 1,
        gpus_per_engine=config.vllm.tensor_parallel_size,
        environment=engine_environment(model, device=device),
        timeout_s=config.cluster.start_timeout_s,
        what="the student's engines",
        lane=STUDENT,
    ) as engines:
        yield engines.handles


@contextmanager
def rollout_engines(config: Config, *, model: str, shared: PlacementGroup | None = None) -> Iterator[EngineActors]:
    """Engines that sample rollouts from a student in training; `engine_sync` brings them its weights.

    Args:
        config: `vllm.*`, `ds.lora.rank`.
        model: folder or hub name of the student as training starts.
        shared: where the ranks are, if engines share their GPUs: engine i that of bundle i. They can sleep then.
    """
    device = cluster_device()
    update = UpdateOptions(
        _transfer(device, shared=shared is not None),
        lora_rank=config.ds.lora.rank,
        sleep=shared is not None and device == "cuda",
    )
    with engine_actors(
        StudentSampler,
        _student_arguments(config, model, device, update=update),
        num_engines=config.vllm.num_engines or 1,
        gpus_per_engine=config.vllm.tensor_parallel_size,
        environment=engine_environment(model, device=device),
        timeout_s=config.cluster.start_timeout_s,
        what="the student's engines",
        lane=STUDENT,
        shared=shared,
    ) as engines:
        yield engines


def engine_sync(config: Config, ranks: Ranks, engines: EngineActors, *, shared: bool = False) -> EngineSync:
    """What brings the student to its engines as they are now; make another one when an engine was replaced.

    Args:
        config: `algo.distill.in_flight`, `cluster.sync_timeout_s`, `vllm.tensor_parallel_size`, `ds.lora.rank`.
        ranks: of the student.
        engines: of `rollout_engines`.
        shared: whether these share the ranks' GPUs.

    Raises:
        ConfigError: an engine hosts another architecture than the ranks.
        ClusterError: ranks and engines did not come together.
    """
    in_flight, timeout_s = config.algo.distill.in_flight, config.cluster.sync_timeout_s
    if config.ds.lora.rank > 0:
        folder = Path(config.ckpt.output_dir) / ADAPTERS_FOLDER
        return AdapterSync(ranks, engines.handles, folder=folder.absolute(), in_flight=in_flight, timeout_s=timeout_s)
    return WeightSync(
        ranks,
        engines.handles,
        transfer=_transfer(cluster_device(), shared=shared),
        workers_per_engine=config.vllm.tensor_parallel_size,
        in_flight=in_flight,
        timeout_s=timeout_s,
    )


def _transfer(device: Device, *, shared: bool) -> Transfer:
    if device == "cpu":
        return "gloo"
    return "ipc" if shared else "nccl"


def _student_arguments(config: Config, model: str, device: Device, *, update: UpdateOptions | None) -> dict[str, Any]:
    return engine_arguments(
        model,
        max_model_len=config.data.max_len,
        max_num_seqs=config.teacher.max_num_seqs,
        seed=config.train.seed,
        tensor_parallel_size=config.vllm.tensor_parallel_size,
        gpu_memory_utilization=config.vllm.gpu_memory_utilization,
        enforce_eager=config.vllm.enforce_eager,
        enable_prefix_caching=config.vllm.enable_prefix_caching,
        trust_remote_code=config.trust_remote_code,
        update=update,
        device=device,
    )


@contextmanager
def engine_actors(
    actor_class: type,
    arguments: Any,
    *,
    num_engines: int,
    gpus_per_engine: int,
    environment: dict[str, str],
    timeout_s: float,
    what: str,
    lane: str | None = None,
    shared: PlacementGroup | None = None,
) -> Iterator[EngineActors]:
    """Actors that host one engine each, ended with the block.

    Args:
        actor_class: plain class, wrapped here; answers `ready()` once it can work.
        arguments: what the class is constructed with.
        num_engines: actors.
        gpus_per_engine: GPUs of each.
        environment: environment variables of the actors' processes.
        timeout_s: longest wait for room, and for the engines to start.
        what: name of the engines in messages.
        lane: and, with a number each, in the timeline; they answer `take_spans` then. None: not there.
        shared: place them there, beside other actors on the same GPUs, rather than on GPUs of their own.
    """
    share = 1.0 if shared is None else GPU_SHARE
    # Whoever waits for responses must not keep out who brings new weights, or asks whether the engine lives.
    options: Any = {"concurrency_groups": {CONTROL: CONTROL_CALLS}}
    remote_class: Any = ray.remote(max_restarts=0, max_task_retries=0, **options)(actor_class)
    bundles = [{"CPU": 1.0, "GPU": float(gpus_per_engine)}] * num_engines
    own = placed(bundles, timeout_s=timeout_s, what=what) if shared is None else nullcontext(shared)
    with own as group:

        def start(place: int) -> Any:
            return remote_class.options(
                num_cpus=share,
                num_gpus=share * gpus_per_engine,
                max_concurrency=ENGINE_CALLS,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place),
            ).remote(arguments)

        console.print(f"[dim]starting {what}: {num_engines}[/dim]", highlight=False)
        actors = EngineActors(start, num_engines, have_children=gpus_per_engine > 1)

        def take_spans() -> dict[str, Any]:
            if lane is None:
                return {}
            return {f"{lane} {place}": control(handle.take_spans) for place, handle in enumerate(actors.handles)}

        try:
            with driver_span("start"):
                ready = [actor.ready.remote() for actor in actors.handles]
                wait_for(ready, timeout_s=timeout_s, what=f"{what} to start")
            with collected(take_spans):
                yield actors
        finally:
            actors.end()
