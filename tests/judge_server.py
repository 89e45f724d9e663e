"""An OpenAI-compatible server that prefers answers by a rule, counts what it is asked, and fails as it is told."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from openrlhf_bd.evaluation.results import SavedResponse

HANG_S = 30.0
KEY = "sk-never-to-be-written-down"
# What it does with a request: None answers by the rule; text is the answer; a number is a status; (status, headers);
# "cut" sends half an answer, "hang" sends none for HANG_S, "page" one that is none of the API's.
Behaviour = Callable[[int, dict[str, Any]], "str | int | tuple[int, dict[str, str]] | None"]


def quality(answer: str) -> int:
    """The rule: an answer is as good as its number of exclamation marks."""
    return answer.count("!")


def verdict(question: str) -> str:
    """A, B or Tie by the rule."""
    found = re.search(r"### ANSWER A\n(.*)\n\n### ANSWER B\n(.*)\n\n", question, re.DOTALL)
    assert found is not None
    one, other = quality(found.group(1)), quality(found.group(2))
    return "Tie" if one == other else "A" if one > other else "B"


@dataclass
class JudgeServer:
    """A running server.

    Attributes:
        url: of its API.
        behaviour: called with the number of the request, from 1, and its body.
        bodies: every request, in the order in which they came.
        keys: what they had as key.
        usage: whether answers count tokens.
    """

    url: str
    behaviour: Behaviour = lambda number, body: None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    usage: bool = True

    @property
    def asked(self) -> Counter[str]:
        """How often each question came."""
        return Counter(body["messages"][0]["content"] for body in self.bodies)


@contextlib.contextmanager
def judge_server(behaviour: Behaviour = lambda number, body: None) -> Iterator[JudgeServer]:
    """A server until the block is left."""
    lock, left = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.bodies.append(body)
                server.keys.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
                does = server.behaviour(len(server.bodies), body)
            if does == "hang":
                left.wait(HANG_S)
                self.close_connection = True
            elif isinstance(does, int):
                self._send(does, {"error": {"message": f"injected {does}"}})
            elif isinstance(does, tuple):
                self._send(does[0], {"error": {"message": f"injected {does[0]}"}}, does[1])
            elif does == "page":
                self._send(200, {"detail": "welcome"})
            else:
                text = verdict(body["messages"][0]["content"]) if does in (None, "cut") else does
                answer: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}}]}
                if server.usage:
                    answer["usage"] = {"prompt_tokens": 100, "completion_tokens": 1}
                self._send(200, answer, cut=does == "cut")

        def _send(
            self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None, *, cut: bool = False
        ) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **(headers or {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            # A client that was killed takes no answer.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = cut

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = JudgeServer(f"http://127.0.0.1:{httpd.server_address[1]}/v1", behaviour)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        left.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join(10)


def slow(seconds: float) -> Behaviour:
    """Answers by the rule, one after the other, each after so long."""

    def behaviour(number: int, body: dict[str, Any]) -> None:
        time.sleep(seconds)

    return behaviour


def saved_response(prompt_id: str, response: str, **values: Any) -> SavedResponse:
    """A response to a prompt of its own: its instruction has the prompt's id."""
    fields = {
        "test_set": "dolly",
        "prompt_id": prompt_id,
        "seed": 10,
        "top_p": 1.0,
        "instruction": f"instruction {prompt_id}",
        "input": "",
        "references": ["reference"],
        "response": response,
        "num_tokens": 3,
        "finish_reason": "stop",
        "rouge_l": 10.0,
        "correct": None,
    }
    return SavedResponse.model_validate({**fields, **values})


def write_responses_file(path: Path, responses: Sequence[str] | Sequence[SavedResponse]) -> Path:
    """A file of responses; of plain texts the prompts are p0, p1, ...; returns the path."""
    rows = [saved_response(f"p{number}", row) if isinstance(row, str) else row for number, row in enumerate(responses)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    return path
