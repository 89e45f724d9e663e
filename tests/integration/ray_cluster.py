"""A Ray cluster of its own for a test: real `ray start` processes on this machine, token, job server, logical GPUs.

Nothing is shared with another cluster on the machine: ports, folders and token are new each time, and only processes
that were started here are ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
NUM_CPUS = 8
NUM_GPUS = 4
OBJECT_STORE_BYTES = 200 * 1024**2
WORKER_PORTS = 200
LOG_TAIL_LINES = 30


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster.

    Attributes:
        address: of the cluster, for `ray.init`: host:port.
        job_address: of the job server, for `ray job submit` and RAY_ADDRESS: http://host:port.
        env: environment of a client of this cluster: this process's, with the token and RAY_ADDRESS = job_address.
        folder: temporary folder; Ray's own logs are in ray/session_latest/logs below it.
        num_nodes: nodes that were started.
    """

    address: str
    job_address: str
    env: dict[str, str]
    folder: Path
    num_nodes: int


@contextlib.contextmanager
def local_ray_head(
    num_nodes: int = 1, *, num_cpus: int = NUM_CPUS, num_gpus: int = NUM_GPUS, hidden: Path | None = None
) -> Iterator[LocalCluster]:
    """A cluster of `num_nodes` nodes on this machine, each with its own loopback address, until the block is left.

    Args:
        num_nodes: nodes; the first is the head.
        num_cpus: logical CPUs of each node.
        num_gpus: logical GPUs of each node.
        hidden: a folder that the head alone sees: in the other nodes' mount namespaces an empty disk hides it. Needs
            the rights to mount, see `can_mount`.

    Raises:
        RuntimeError: a node ended or did not answer within START_TIMEOUT_S; the message has the end of the logs.
    """
    # A short path: Ray puts Unix sockets below it, whose names may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="bd-", dir="/tmp"))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        ports = free_ports(2)
        cluster = LocalCluster(
            address=f"127.0.0.1:{ports[0]}",
            job_address=f"http://127.0.0.1:{ports[1]}",
            env=_client_env(folder, f"http://127.0.0.1:{ports[1]}"),
            folder=folder,
            num_nodes=num_nodes,
        )
        resources = [f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        head = ["--head", "--node-ip-address=127.0.0.1", f"--port={ports[0]}", f"--temp-dir={folder / 'ray'}"]
        head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}", "--include-dashboard=true"]
        processes.append(_start_node(cluster, "head", [*head, *resources]))
        _wait_for(cluster, processes, num_alive=1)
        for node in range(1, num_nodes):
            # 127.0.0.2 is left out: Linux distributions give that address to the machine's own name.
            worker = [f"--address={cluster.address}", f"--node-ip-address=127.0.0.{node + 2}"]
            processes.append(_start_node(cluster, f"node{node}", [*worker, *resources], hidden=hidden))
            _wait_for(cluster, processes, num_alive=node + 1)
        yield cluster
    finally:
        for process in reversed(processes):
            _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _client_env(folder: Path, job_address: str) -> dict[str, str]:
    token = folder / "token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    token.chmod(0o600)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    return env | {
        "RAY_ADDRESS": job_address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHON": sys.executable,
    }


def can_mount() -> bool:
    """Whether this process may hide folders from a node."""
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


def _start_node(
    cluster: LocalCluster, name: str, arguments: list[str], *, hidden: Path | None = None
) -> subprocess.Popen[bytes]:
    mount = f'mount -t tmpfs none "{hidden}" && exec "$@"'
    prefix = [] if hidden is None else ["unshare", "-m", "sh", "-c", mount, "sh"]
    env = {key: value for key, value in cluster.env.items() if key != "RAY_ADDRESS"}
    with (cluster.folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [
                *(*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
                *arguments,
                *own_ports(arguments),
            ],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def own_ports(arguments: list[str]) -> list[str]:
    """Further options of `ray start` for a node that shares its machine with others: ports that are free now.

    Args:
        arguments: what it is started with; ports in them are left alone.
    """
    taken = {int(number) for number in re.findall(r"\d{4,5}", " ".join(arguments))}
    client, node_manager, object_manager, metrics, runtime_env, agent, agent_grpc, *workers = free_ports(
        7 + WORKER_PORTS, avoid=taken
    )
    options = [
        f"--node-manager-port={node_manager}",
        f"--object-manager-port={object_manager}",
        f"--metrics-export-port={metrics}",
        f"--runtime-env-agent-port={runtime_env}",
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--worker-port-list={','.join(map(str, workers))}",
    ]
    return [*options, f"--ray-client-server-port={client}"] if {"head", "--head"} & set(arguments) else options


def free_ports(count: int, *, avoid: Collection[int] = ()) -> list[int]:
    """Ports that nothing listens on. All are held until all are chosen, so they differ."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            each = stack.enter_context(socket.socket())
            each.bind(("", 0))
            port = each.getsockname()[1]
            if port not in avoid:
                ports.append(port)
        return ports


def _wait_for(cluster: LocalCluster, processes: list[subprocess.Popen[bytes]], *, num_alive: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while _num_alive_nodes(cluster) < num_alive:
        ended = [process.returncode for process in processes if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            reason = f"`ray start` ended with {ended}" if ended else f"no answer in {START_TIMEOUT_S:.0f} s"
            raise RuntimeError(
                f"waiting for {num_alive} node(s) at {cluster.job_address}: {reason}\n{log_tails(cluster)}"
            )
        time.sleep(0.5)


def _num_alive_nodes(cluster: LocalCluster) -> int:
    """Alive nodes by the dashboard, which also serves jobs; 0 while it does not answer."""
    token = Path(cluster.env["RAY_AUTH_TOKEN_PATH"]).read_text(encoding="utf-8")
    headers = {"Authorization": f"Bearer {token}"}
    try:
        jobs = requests.get(f"{cluster.job_address}/api/jobs/", headers=headers, timeout=10)
        nodes = requests.get(f"{cluster.job_address}/nodes?view=summary", headers=headers, timeout=10)
        if jobs.status_code != 200 or nodes.status_code != 200:
            return 0
    except requests.RequestException:
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes.json()["data"]["summary"])


def log_tails(cluster: LocalCluster, lines: int = LOG_TAIL_LINES) -> str:
    """The ends of the nodes' own logs and of Ray's, for the message of a failed test."""
    ray_logs = cluster.folder / "ray" / "session_latest" / "logs"
    names = ["dashboard.log", "monitor.log", "raylet.err", "gcs_server.err"]
    paths = [*sorted(cluster.folder.glob("*.log")), *(ray_logs / name for name in names)]
    tails = [f"---- {path.name}\n" + "\n".join(_last_lines(path, lines)) for path in paths if path.exists()]
    return "\n".join(tails)


def _last_lines(path: Path, lines: int) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends `ray start --block` and whatever it started; Ray's processes outlive it when it is killed outright."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=3)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
