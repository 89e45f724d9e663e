"""vLLM's own OpenAI-compatible server with one model, as a process that ends together with whoever started it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from transformers import AutoTokenizer

from openrlhf_bd.engines.arguments import CPU_BLOCK_TOKENS, CPU_KV_CACHE_LIMIT_BYTES, Device, engine_environment
from openrlhf_bd.engines.keeper import GRACE_S

# For models that were never taught to talk: roles and messages one below the other.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n\\n' }}{% endfor %}"
    "{{ 'assistant:' }}"
)
_LAST_LINES = 30
_HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server hosts.

    Attributes:
        model: folder or hub name.
        name: that requests call it by.
        key: that requests must have; in no command line, log or representation.
        num_devices: GPUs that share the model, or on CPUs processes.
        device: where it runs.
        log: file that its output is appended to.
    """

    model: str
    name: str
    key: str = field(repr=False)
    num_devices: int
    device: Device
    log: Path


class ServerProcess:
    """A server from its construction until `end`, or until this process is gone.

    Args:
        options: what it hosts.
        host: address that it listens at.

    Attributes:
        url: of it, without the path of the API.
    """

    def __init__(self, options: ServerOptions, *, host: str) -> None:
        port = _free_port(host)
        self.url = f"http://{host}:{port}"
        command = [sys.executable, "-m", "openrlhf_bd.engines.keeper", sys.executable]
        # Not `vllm serve`, which wants a package of that very name: the one for CPUs has another.
        command += ["-m", "vllm.entrypoints.openai.api_server", *_arguments(options)]
        self._log = options.log
        options.log.parent.mkdir(parents=True, exist_ok=True)
        with options.log.open("ab") as output:
            self._keeper = subprocess.Popen(
                [*command, "--host", host, "--port", str(port)],
                env={**os.environ, **_environment(options)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether the server is gone."""
        return self._ends_within(0.0)

    @property
    def healthy(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(httpx.TransportError):
            # Never through a proxy that the environment names.
            answer = httpx.get(f"{self.url}/health", timeout=_HEALTH_TIMEOUT_S, trust_env=False)
            return answer.status_code == 200
        return False

    def last_lines(self) -> str:
        """The end of its output."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LAST_LINES:])

    def end(self) -> None:
        """End it with its children; no matter if it is gone."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._ends_within(2 * GRACE_S)

    def _ends_within(self, timeout_s: float) -> bool:
        assert self._keeper.stdout is not None
        # Nothing is ever written there: it is readable once it is closed.
        return bool(select.select([self._keeper.stdout], [], [], timeout_s)[0])


def _arguments(options: ServerOptions) -> list[str]:
    arguments = ["--model", options.model, "--served-model-name", options.name, "--disable-uvicorn-access-log"]
    # As long as the model and the memory allow.
    arguments += ["--max-model-len", "auto", "--generation-config", "vllm"]
    arguments += ["--tensor-parallel-size", str(options.num_devices)]
    # In an actor's environment vLLM would otherwise look for Ray.
    arguments += ["--distributed-executor-backend", "mp" if options.num_devices > 1 else "uni"]
    if AutoTokenizer.from_pretrained(options.model).chat_template is None:
        arguments += ["--chat-template", PLAIN_TEMPLATE]
    if options.device == "cpu":
        arguments += ["--dtype", "float32", "--enforce-eager", "--block-size", str(CPU_BLOCK_TOKENS)]
        arguments += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE_LIMIT_BYTES)]
    return arguments


def _environment(options: ServerOptions) -> dict[str, str]:
    num_threads = 1
    if options.device == "cpu":
        num_threads = max(1, len(os.sched_getaffinity(0)) // options.num_devices)
    return {
        **engine_environment(options.model, num_threads=num_threads, device=options.device),
        # The server and its engine are two processes.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        # Not among the flags, where every user of the machine could read it.
        "VLLM_API_KEY": options.key,
    }


def _free_port(host: str) -> int:
    with socket.socket() as listener:
        listener.bind((host, 0))
        port: int = listener.getsockname()[1]
        return port
