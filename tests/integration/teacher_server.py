"""vLLM's own OpenAI-compatible server with a tiny model, and a proxy in front of it that fails as it is told."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT_S = 240.0
HOST = "127.0.0.1"
HANG_S = 6.0
# What a fault does with a request; None lets it pass.
Fault = Callable[[str, dict[str, Any]], "str | int | dict[str, Any] | None"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def vllm_server(model: Path, *flags: str, name: str, key: str, log: Path) -> Iterator[str]:
    """A server until the block is left; its URL, without /v1.

    Args:
        model: folder with weights and tokenizer.
        flags: further flags.
        name: of the served model.
        key: that requests must have.
        log: file of its output.

    Raises:
        RuntimeError: it ended or did not answer within START_TIMEOUT_S; the message has the end of its output.
    """
    url = f"http://{HOST}:{free_port()}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--host", HOST, "--port", url.rpartition(":")[2], "--dtype", "float32"]
    command += ["--enforce-eager", "--block-size", "32", "--no-enable-chunked-prefill", "--max-num-seqs", "32"]
    environment = {
        **os.environ,
        # Not among the flags, where every user of the machine could read it.
        "VLLM_API_KEY": key,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *flags], env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_for(url, process, log)
        yield url
    finally:
        # Its engine is a process of its own, of the same group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
            raise RuntimeError(f"the server at {url} did not start (status {process.returncode}):\n{tail}")
        time.sleep(0.5)


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        url: its own, without /v1.
        fault: called with path and body of each request. It returns None (the request passes), a body (which passes
            instead), a status (the answer), "close" (the connection is closed without an answer), or "hang" (the same,
            after HANG_S).
        fired: how often each fault was injected: by status, "close", "hang" or "body".
        passed: completions that the server answered.
    """

    url: str
    fault: Fault = lambda path, body: None
    fired: Counter[str] = field(default_factory=Counter)
    passed: int = 0

    def reset(self, fault: Fault) -> None:
        self.fault, self.passed = fault, 0
        self.fired.clear()


@contextlib.contextmanager
def faulty_proxy(server_url: str) -> Iterator[Proxy]:
    """A proxy in front of a server, until the block is left."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._handle({})

        def do_POST(self) -> None:
            self._handle(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _handle(self, body: dict[str, Any]) -> None:
            with lock:
                fault = proxy.fault(self.path, body)
                if fault is not None:
                    proxy.fired["body" if isinstance(fault, dict) else str(fault)] += 1
            if fault in ("close", "hang"):
                time.sleep(HANG_S if fault == "hang" else 0)
                self.close_connection = True
            elif isinstance(fault, int):
                self._answer(fault, b'{"error": {"message": "injected"}}')
            else:
                self._pass(body if fault is None else fault)

        def _pass(self, body: Any) -> None:
            headers = {"Authorization": self.headers.get("Authorization", "")}
            answer = httpx.request(
                self.command, server_url + self.path, json=body or None, headers=headers, timeout=120
            )
            with lock:
                proxy.passed += self.path.endswith("/completions") and answer.status_code == 200
            self._answer(answer.status_code, answer.content)

        def _answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    httpd = ThreadingHTTPServer((HOST, 0), Handler)
    httpd.daemon_threads = True
    proxy = Proxy(f"http://{HOST}:{httpd.server_address[1]}")
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join(10)
