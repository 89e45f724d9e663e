"""A judge that the job hosts itself: vLLM's server in a Ray actor, for as long as there is something to judge."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from openrlhf_bd.config import Config, JudgeOptions
from openrlhf_bd.driver.cluster import cluster_device, placed, ray_session
from openrlhf_bd.driver.model_files import inspect_model
from openrlhf_bd.driver.models import load_tokenizer
from openrlhf_bd.driver.progress import console
from openrlhf_bd.endpoint import ApiOptions
from openrlhf_bd.engines.keeper import GRACE_S
from openrlhf_bd.engines.server import ServerOptions, ServerProcess
from openrlhf_bd.errors import ClusterError, ConfigError, ResourceError
from openrlhf_bd.rollout.calls import wait_for
from openrlhf_bd.store.files import sha256_file
from openrlhf_bd.store.fingerprints import fingerprint_json, fingerprint_model_folder

SERVER_LOG = "judge_server.log"
_LOOPBACK = "127.0.0.1"
_POLL_S = 0.5
# An actor that looks after a process answers at once, unless its machine is busy or gone.
_ANSWER_TIMEOUT_S = 60.0
_WHAT = "the judge's server"
# Beside weights and configuration: what a judge is shown.
_TEXT_FILES = ("*token*.json", "*.jinja")


class ServerActor:
    """Actor that holds a server's GPUs.

    Args:
        options: of the server.
        driver_node: id of the node that the requests come from; from there loopback is near enough.
    """

    def __init__(self, options: ServerOptions, driver_node: str) -> None:
        is_near = ray.get_runtime_context().get_node_id() == driver_node
        self._server = ServerProcess(options, host=_LOOPBACK if is_near else get_node_ip_address())

    def state(self) -> tuple[Literal["starting", "ready", "ended"], str]:
        """How far it is, and its URL; where it is gone, its last lines."""
        if self._server.ended:
            return "ended", self._server.last_lines()
        return "ready" if self._server.healthy else "starting", self._server.url

    def end(self) -> str | None:
        """End it. Returns its last lines if it was gone before, else None."""
        lines = self._server.last_lines() if self._server.ended else None
        self._server.end()
        return lines


def check_served(model: str, options: JudgeOptions) -> None:
    """Look for what can be known to be wrong with a judge before it is started.

    Args:
        model: folder or hub name.
        options: `serve_gpus`.

    Raises:
        ConfigError: its heads cannot be shared out to so many GPUs.
        DataError: there is no such model, its files are not what they should be, or it has no tokenizer.
    """
    facts = inspect_model(model, option="--serve", trust_remote_code=False)
    if facts.num_heads is not None and facts.num_heads % options.serve_gpus:
        raise ConfigError(
            f"--serve_gpus {options.serve_gpus}: {model} has {facts.num_heads} attention heads, which so many GPUs "
            "cannot share; expected a divisor"
        )
    load_tokenizer(model, Config())


def check_serving_cluster(options: JudgeOptions, resources: Mapping[str, float]) -> None:
    """Compare with what the cluster has.

    Raises:
        ResourceError: the judge needs more GPUs.
    """
    available = int(resources.get("GPU", 0))
    if options.serve is not None and options.serve_gpus > available:
        raise ResourceError(
            f"the Ray cluster has {available} GPUs, {_WHAT} needs {options.serve_gpus} (--serve_gpus). Lower it or add "
            "nodes (on machines without GPUs: ray start --num-gpus N, where N is only a number)"
        )


def with_served_name(options: JudgeOptions) -> JudgeOptions:
    """Options whose `model` says what is served: a hub name, or a folder's name with a digest of its content.

    Verdicts are kept by that name, so those of other weights in the same folder are never taken for this judge's.

    Raises:
        DataError: the folder holds no model.
    """
    if options.serve is None:
        return options
    folder = Path(options.serve).expanduser()
    name = options.serve
    if folder.is_dir():
        texts = {file.name: sha256_file(file) for pattern in _TEXT_FILES for file in folder.glob(pattern)}
        digest = fingerprint_json([fingerprint_model_folder(folder), texts])
        name = f"{folder.resolve().name}@{digest[:8]}"
    return options.model_copy(update={"model": name})


@contextmanager
def hosted_judge(options: JudgeOptions, output_dir: Path) -> Iterator[ApiOptions]:
    """A server with the judge for the length of the block, in the Ray session that is open or in one of its own.

    Args:
        options: `serve*`, and the `model` that `with_served_name` made.
        output_dir: gets the server's log; on a cluster a folder that all nodes see.

    Raises:
        ResourceError: the cluster has not so many GPUs.
        ClusterError: it did not start in `serve_timeout_s`, or ended; the message has the end of its log.
    """
    assert options.serve is not None
    folder = Path(options.serve).expanduser()
    with ray_session(num_gpus=options.serve_gpus) as resources:
        check_serving_cluster(options, resources)
        server = ServerOptions(
            model=str(folder.absolute()) if folder.is_dir() else options.serve,
            name=options.model,
            key=secrets.token_urlsafe(32),
            num_devices=options.serve_gpus,
            device=cluster_device(),
            log=(output_dir / SERVER_LOG).absolute(),
        )
        bundle = {"CPU": 1.0, "GPU": float(options.serve_gpus)}
        with placed([bundle], timeout_s=options.serve_timeout_s, what=_WHAT) as group:
            console.print(f"[dim]starting {_WHAT}: {options.model}; its log: {server.log}[/dim]", highlight=False)
            actor_class: Any = ray.remote(max_restarts=0, max_task_retries=0)(ServerActor)
            actor = actor_class.options(
                num_cpus=1, num_gpus=options.serve_gpus, scheduling_strategy=PlacementGroupSchedulingStrategy(group)
            ).remote(server, ray.get_runtime_context().get_node_id())
            try:
                url = _wait_until_ready(actor, server.log, options.serve_timeout_s)
                yield ApiOptions(f"{url}/v1", server.key, options.timeout_s, options.max_retries, direct=True)
            finally:
                _end(actor, server.log)


def _wait_until_ready(actor: Any, log: Path, timeout_s: float) -> str:
    """The server's URL once it answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        state, text = wait_for(
            actor.state.remote(), timeout_s=max(_ANSWER_TIMEOUT_S, deadline - time.monotonic()), what=_WHAT
        )
        if state == "ready":
            return str(text)
        if state == "ended":
            raise ClusterError(f"{_WHAT} ended before it answered; the end of {log}:\n{text}")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{_WHAT} did not answer at {text}/health within {timeout_s:.0f} s (--serve_timeout_s); its log: "
                f"{log}. Give it longer if it was still loading, and run the same command again"
            )
        time.sleep(_POLL_S)


def _end(actor: Any, log: Path) -> None:
    """End the server, and say so if it had ended by itself."""
    try:
        lines = ray.get(actor.end.remote(), timeout=3 * GRACE_S)
    except RayError:
        # The actor or its node is gone; the server ends with it.
        lines = None
    ray.kill(actor)
    if lines is not None:
        console.print(f"{_WHAT} had ended by itself; the end of {log}:\n{lines}", highlight=False, markup=False)
