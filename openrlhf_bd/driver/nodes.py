"""What the nodes of a cluster see: the run's folders, the models, their GPUs. Asked before any actor starts.

One task looks around on each node where actors may go. It asks for no CPU or GPU, so it waits for nobody, and the wait
for it has a limit.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from openrlhf_bd.config import Config
from openrlhf_bd.driver.cluster import cluster_device
from openrlhf_bd.driver.gpu_memory import Gpu, check_gpu_memory
from openrlhf_bd.driver.node_view import FolderView, NodeView, look
from openrlhf_bd.driver.plan import Plan
from openrlhf_bd.errors import ClusterError, ResourceError
from openrlhf_bd.paths import existing_parent, format_bytes

PROBE_TIMEOUT_S = 120.0


def check_nodes(config: Config, plan: Plan, evaluated: Mapping[str, str] | None = None) -> list[str]:
    """Check what every node of the session's cluster sees of a job, and whether its actors fit into the GPUs.

    Args:
        config: the job.
        plan: of its checks.
        evaluated: further models that engines load, by label.

    Returns:
        Lines for the user: what was found, what was left out, warnings.

    Raises:
        ResourceError: a folder or model is not the same everywhere, or the smallest GPU is too small.
        ClusterError: a node did not answer in time.
    """
    device = cluster_device()
    named = {option: facts.name for option, facts in plan.models.items()}
    named |= {f"model {label!r}": name for label, name in (evaluated or {}).items()}
    models = {option: name for option, name in named.items() if Path(name).is_dir()}
    gpus = view_nodes(shared_folders(config), models, gpus=device == "cuda")
    if device == "cpu":
        return [] if plan.gpu is None else ["GPU memory: not checked, the cluster's GPUs are only numbers"]
    if not gpus:
        return ["GPU memory: not checked, nvidia-smi gave none on any node"]
    smallest = min(gpus, key=lambda gpu: gpu.total_bytes)
    found = f"GPU memory: {len(gpus)} GPUs, the smallest has {format_bytes(smallest.total_bytes)} ({smallest.name})"
    return [found, *(f"warning: {line}" for line in check_gpu_memory(plan.gpu or (), gpus))]


def shared_folders(config: Config) -> dict[str, Path]:
    """Folders that driver, ranks and engines all use, by option."""
    found = {"--ckpt.output_dir": config.ckpt.output_dir, "--ckpt.path": config.ckpt.path}
    found["--teacher.store_path"] = config.teacher.store_path
    return {option: Path(path).expanduser().absolute() for option, path in found.items() if path and "://" not in path}


def view_nodes(
    folders: Mapping[str, Path], models: Mapping[str, str], *, gpus: bool, timeout_s: float = PROBE_TIMEOUT_S
) -> list[Gpu]:
    """Check what every node with GPUs sees of a run, and read their memory. Needs a Ray session.

    Args:
        folders: that all nodes read and write, by the option that names each; made or not yet made.
        models: local folders, by the option that names each.
        gpus: whether to read the memory of GPUs.
        timeout_s: longest wait for all nodes.

    Returns:
        The GPUs that Ray has; none where they cannot be asked.

    Raises:
        ResourceError: a node does not see a folder or a model, or something else in its place.
        ClusterError: a node did not answer in time.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) > 0}
    names = {node_id: _node_name(node) for node_id, node in nodes.items()}
    others = nodes.keys() - {here}
    paths = [*models.values()] if others else []
    with _written(folders.values() if others else ()) as written:
        files = [str(file) for file in written]
        views = _ask({node_id: names[node_id] for node_id in others}, files, paths, gpus=gpus, timeout_s=timeout_s)
    own = look([], paths, gpus=gpus and here in nodes)
    for node_id, view in views.items():
        for (option, path), (file, token) in zip(folders.items(), written.items(), strict=True):
            seen = view.folders[str(file)]
            check_folder(seen, token, name=names[node_id], path=path, place=file.parent, option=option)
        for option, model in models.items():
            check_model(view.models[model], own.models[model], name=names[node_id], model=model, option=option)
    views |= {here: own} if here in nodes else {}
    return [gpu for node_id, view in views.items() for gpu in _rays_gpus(nodes[node_id], names[node_id], view)]


def check_folder(view: FolderView, token: str, *, name: str, path: Path, place: Path, option: str) -> None:
    """Refuse a folder that a node does not share with the driver.

    Args:
        view: of the node.
        token: what the driver wrote.
        name: of the node.
        path: what the option says.
        place: the folder that exists, path itself or one above it.
        option: that names it.

    Raises:
        ResourceError: what the node finds there instead, and what to do.
    """
    advice = (
        "every node reads and writes there: mount the same disk at that path on all of them, or name another folder"
    )
    if view.token != token:
        found = "another folder of that name" if view.exists else "no such folder"
        raise ResourceError(
            f"{option} {path}: node {name} does not see what the driver writes to {place}: it has {found}; {advice} "
            "(docs/clusters.md)"
        )
    if not view.writable:
        raise ResourceError(f"{option} {path}: node {name} cannot write to {place}; {advice}, with the same rights")


def check_model(found: str | None, expected: str | None, *, name: str, model: str, option: str) -> None:
    """Refuse a model folder that is missing on a node, or other than the driver's.

    Raises:
        ResourceError: what the node has there, and what to do.
    """
    if found == expected:
        return
    what = "is missing" if found is None else "has other files"
    raise ResourceError(
        f"{option} {model}: {what} on node {name}; every node loads it from there: put the model on a disk that all "
        "nodes share, or copy it to the same path on each (docs/clusters.md)"
    )


@contextmanager
def _written(folders: Iterable[Path]) -> Iterator[dict[Path, str]]:
    """A file with a secret in each folder, or in the nearest one above it that exists; removed with the block."""
    written = {
        existing_parent(folder) / f".openrlhf-bd-{secrets.token_hex(8)}": secrets.token_hex(16) for folder in folders
    }
    try:
        for file, token in written.items():
            file.write_text(token, encoding="utf-8")
        yield written
    finally:
        for file in written:
            file.unlink(missing_ok=True)


def _ask(
    names: Mapping[str, str], files: Sequence[str], models: Sequence[str], *, gpus: bool, timeout_s: float
) -> dict[str, NodeView]:
    """The view of each node, by its id, which has a name for messages."""
    remote: Any = ray.remote(num_cpus=0, max_retries=0)
    task = remote(look)
    refs = {}
    for node_id in names:
        place = NodeAffinitySchedulingStrategy(node_id, soft=False)
        refs[task.options(scheduling_strategy=place).remote(files, models, gpus=gpus)] = node_id
    if not refs:
        return {}
    ready, waiting = ray.wait([*refs], num_returns=len(refs), timeout=timeout_s)
    for ref in waiting:
        ray.cancel(ref, force=True)
    if waiting:
        silent = ", ".join(sorted(names[refs[ref]] for ref in waiting))
        raise ClusterError(
            f"no answer within {timeout_s:.0f} s from node {silent}, which was asked what it sees of the run; look at "
            "Ray's logs there, and whether its firewall lets the other nodes in (docs/clusters.md)"
        )
    return {refs[ref]: _view(ref, names[refs[ref]]) for ref in ready}


def _view(ref: Any, name: str) -> NodeView:
    try:
        view: NodeView = ray.get(ref)
    except RayTaskError as error:
        reason = f"{type(error.cause).__name__}: {error.cause}"
        raise ResourceError(
            f"node {name} could not be asked what it sees: {reason}. Every node needs the same environment and sources "
            "(docs/clusters.md)"
        ) from error
    except RayError as error:
        raise ClusterError(f"node {name} could not be asked what it sees: {error}") from error
    return view


def _node_name(node: Mapping[str, Any]) -> str:
    address = node["NodeManagerAddress"]
    name = node.get("NodeName") or node["NodeManagerHostname"]
    return address if name == address else f"{name} ({address})"


def _rays_gpus(node: Mapping[str, Any], name: str, view: NodeView) -> list[Gpu]:
    """As many of a node's GPUs as Ray has there, the largest: which ones it was given is not known."""
    largest = sorted(view.gpus, key=lambda gpu: gpu[1], reverse=True)[: int(node["Resources"]["GPU"])]
    return [Gpu(name, device, total, used) for device, total, used in largest]
