"""A judge over HTTP: win rates by hand, a server that misbehaves, a kill, and vLLM's own server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from teacher_server import vllm_server

from openrlhf_bd.cli.judge import main
from openrlhf_bd.cli.new_model import main as new_model
from openrlhf_bd.config import JudgeOptions
from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.errors import ClusterError, ConfigError, DataError, RunFolderError
from openrlhf_bd.evaluation.judge import judge_pairs
from openrlhf_bd.evaluation.judge_cache import JUDGEMENTS_FILE
from openrlhf_bd.evaluation.judge_prompt import REMINDER
from openrlhf_bd.evaluation.win_rates import (
    NO_ANSWER,
    NO_VERDICT,
    NOT_ASKED,
    REFUSED,
    Counts,
    PairRates,
    WinRates,
)
from tests.judge_server import KEY, JudgeServer, judge_server, saved_response, slow, write_responses_file

pytestmark = pytest.mark.integration

PAIR = ("BD", "KD")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def write(folder: Path, **methods: Sequence[str]) -> dict[str, Path]:
    return {
        label: write_responses_file(folder / f"{label}.responses.jsonl", answers) for label, answers in methods.items()
    }


def judge(
    folder: Path, server: JudgeServer, pairs: Sequence[tuple[str, str]] = (PAIR,), **options: Any
) -> tuple[WinRates, PairRates]:
    """Judge what lies in a folder, into its subfolder `judge`; a server that fails is not given long."""
    responses = {path.name.partition(".")[0]: path for path in folder.glob("*.responses.jsonl")}
    values = {"api_base": server.url, "model": "rule", "max_retries": 0, "timeout_s": 5.0, **options}
    rates = judge_pairs(responses, pairs, JudgeOptions.model_validate(values), folder / "judge")
    return rates, rates.pairs[0]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "judge" / JUDGEMENTS_FILE).read_text(encoding="utf-8").splitlines()]


def test_win_rate_by_hand(tmp_path: Path) -> None:
    """By the rule (most exclamation marks) BD wins two of five prompts, ties in one and loses two, in either order."""
    write(tmp_path, BD=["a!", "b!!", "c", "d", "e"], KD=["a", "b!", "k", "d!", "e!!"])
    with judge_server() as server:
        rates, pair = judge(tmp_path, server)
    assert pair.win_rate == pytest.approx((1 + 1 + 0.5 + 0 + 0) / 5)
    assert pair.a_first == pair.b_first == Counts(wins=2, ties=1, losses=2)
    assert (pair.num_prompts, pair.num_judged, pair.num_consistent, pair.not_judged) == (5, 5, 5, {})
    assert sum(server.asked.values()) == len(server.asked) == 10
    assert rates.usage.model_dump() == {"num_requests": 10, "prompt_tokens": 1000, "completion_tokens": 10}
    assert WinRates.read(tmp_path / "judge") == rates
    assert {body["temperature"] for body in server.bodies} == {0}
    assert {body["max_tokens"] for body in server.bodies} == {8}


def test_judge_that_always_takes_the_first_gives_one_half(tmp_path: Path) -> None:
    """A preference for a place cancels out, and shows: no prompt has the same outcome in both orders."""
    write(tmp_path, BD=["a", "b!", "c"], KD=["x!", "y", "z"])
    with judge_server(lambda number, body: "A") as server:
        _, pair = judge(tmp_path, server)
    assert (pair.win_rate, pair.num_consistent, pair.p_value) == (0.5, 0, 1.0)
    assert pair.a_first == Counts(wins=3, ties=0, losses=0)
    assert pair.b_first == Counts(wins=0, ties=0, losses=3)


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    """A second call asks nothing; another pair asks for its own; swapped and equal answers are one question."""
    write(tmp_path, BD=["a!", "same"], KD=["a", "same"], SeqKD=["a!!", "same"])
    with judge_server() as server:
        first, _ = judge(tmp_path, server)
        # Two orders of p0, and one question about the equal answers to p1.
        assert len(server.bodies) == 3
        again, _ = judge(tmp_path, server)
        assert again == first
        assert len(server.bodies) == 3
        more, pair = judge(tmp_path, server, [PAIR, ("BD", "SeqKD"), ("SeqKD", "KD")])
        assert pair == first.pairs[0]
        assert [found.win_rate for found in more.pairs] == [0.75, 0.25, 0.75]
        assert max(server.asked.values()) == 1
        assert len(server.bodies) == 3 + 4
        # Another judge is asked anew.
        with pytest.raises(RunFolderError, match="model rule, expected other"):
            judge(tmp_path, server, model="other")
        with pytest.raises(RunFolderError, match="holds the pair BD - SeqKD too"):
            judge(tmp_path, server)
        assert len(server.bodies) == 7
    assert WinRates.read(tmp_path / "judge") == more


def test_prompts_without_partner_and_empty_answers_are_counted(tmp_path: Path) -> None:
    """A prompt that one method lacks is not judged, an empty answer is, and both are told."""
    rows = [saved_response(name, text) for name, text in (("p1", ""), ("p0", "good!"), ("p9", "alone"))]
    write(tmp_path, BD=["good!", "good!", "alone"])
    write_responses_file(tmp_path / "KD.responses.jsonl", rows)
    with judge_server() as server:
        rates, pair = judge(tmp_path, server)
    assert (pair.num_prompts, pair.num_judged, pair.num_empty) == (4, 2, (0, 1))
    assert pair.not_judged == {"no response of KD": 1, "no response of BD": 1}
    assert pair.win_rate == 0.75
    # Nothing that another call could change.
    assert rates.num_missing == 0


def test_no_verdict_is_asked_again_then_not_counted(tmp_path: Path) -> None:
    """A sentence is asked again, with a reminder, as often as allowed; then it is kept, and counted as not judged."""
    write(tmp_path, BD=["a!", "stubborn!", "slow!"], KD=["a", "stubborn", "slow"])

    def behaviour(number: int, body: dict[str, Any]) -> str | None:
        question, *further = body["messages"]
        if "stubborn" in question["content"]:
            return "Both have their merits"
        return "Let me think" if "slow" in question["content"] and not further else None

    with judge_server(behaviour) as server:
        rates, pair = judge(tmp_path, server, max_asks=2)
        assert (pair.num_judged, pair.not_judged, pair.win_rate) == (2, {NO_VERDICT: 1}, 1.0)
        # p0: 2 questions, the others 2 with two answers each.
        assert len(server.bodies) == rates.usage.num_requests == 2 + 4 + 4
        reminded = [body["messages"] for body in server.bodies if len(body["messages"]) > 1]
        assert {messages[2]["content"] for messages in reminded} == {REMINDER}
        kept = [line for line in lines(tmp_path) if line["verdict"] is None]
        assert [line["answers"] for line in kept] == [["Both have their merits"] * 2] * 2
        # Settled, unless more tries are allowed.
        judge(tmp_path, server, max_asks=2)
        assert len(server.bodies) == 10
        judge(tmp_path, server, max_asks=3)
        assert len(server.bodies) == 10 + 2 * 3


def test_rate_limit_is_waited_for(tmp_path: Path) -> None:
    """A 429 with Retry-After is tried again after that time, a 500 after a pause, a cut answer too."""
    write(tmp_path, BD=["a!", "b"], KD=["a", "k"])
    faults: dict[int, Any] = {1: (429, {"Retry-After": "1.5"}), 3: 500, 4: "cut", 5: 503}
    times: list[float] = []

    def behaviour(number: int, body: dict[str, Any]) -> Any:
        times.append(time.monotonic())
        return faults.get(number)

    with judge_server(behaviour) as server:
        rates, pair = judge(tmp_path, server, max_retries=4, concurrency=1)
    assert times[1] - times[0] >= 1.5
    assert len(server.bodies) == 4 + len(faults)
    assert (pair.num_judged, pair.win_rate, rates.num_missing, rates.stopped) == (2, 0.75, 0, None)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "expected a model 'rule' there")],
)
def test_refusal_ends_it_at_once(tmp_path: Path, status: int, message: str) -> None:
    """A wrong key or model is not tried again: one request, one message, nothing counted."""
    write(tmp_path, BD=["a", "b"], KD=["c", "d"])
    with judge_server(lambda number, body: status) as server:
        with pytest.raises(ConfigError, match=message) as raised:
            judge(tmp_path, server, max_retries=5)
        assert len(server.bodies) == 1
    assert KEY not in str(raised.value)
    assert not (tmp_path / "judge" / "win_rates.json").exists()


def test_key_that_is_withdrawn_later(tmp_path: Path) -> None:
    """Refused in the middle: the error ends it, what was judged is kept, and a right key goes on."""
    write(tmp_path, BD=[f"{i}!" for i in range(6)], KD=[f"{i}" for i in range(6)])
    with judge_server(lambda number, body: 401 if number > 4 else None) as server:
        with pytest.raises(ConfigError, match="status 401"):
            judge(tmp_path, server, concurrency=1)
        assert len(lines(tmp_path)) == 4
        server.behaviour = lambda number, body: None
        _, pair = judge(tmp_path, server)
        assert (pair.num_judged, pair.win_rate) == (6, 1.0)
        assert len(server.bodies) == 5 + 8


def test_question_that_is_refused_does_not_stop_the_others(tmp_path: Path) -> None:
    """A question that is too long for the judge is not judged, by name of the reason; the others are."""
    write(tmp_path, BD=["a!", "long " * 50, "c!"], KD=["a", "b", "c"])
    with judge_server(lambda number, body: 400 if "long" in body["messages"][0]["content"] else None) as server:
        rates, pair = judge(tmp_path, server)
        assert (pair.num_judged, pair.not_judged, pair.win_rate) == (2, {REFUSED: 1}, 1.0)
        assert rates.num_missing == 0
        assert "prompt p1" in str(rates.first_error)
        # Asked again by the next call, which ends as well: a server with a longer context would answer.
        again, _ = judge(tmp_path, server)
        assert again == rates
        server.behaviour = lambda number, body: None
        assert judge(tmp_path, server)[1].num_judged == 3


def test_server_that_refuses_every_question_is_found_at_the_first(tmp_path: Path) -> None:
    """An option that the server does not know costs one request, not all."""
    write(tmp_path, BD=["a"] * 20, KD=["b"] * 20)
    with judge_server(lambda number, body: 400) as server:
        with pytest.raises(DataError, match="no --constrained"):
            judge(tmp_path, server)
        assert len(server.bodies) == 1


def test_answer_that_is_no_api(tmp_path: Path) -> None:
    """A web server that answers something else is named, with what was expected."""
    write(tmp_path, BD=["a"], KD=["b"])
    with (
        judge_server(lambda number, body: 404) as server,
        pytest.raises(ConfigError, match="usually http://HOST:PORT/v1"),
    ):
        judge(tmp_path, server)
    with (
        judge_server(lambda number, body: "page") as server,
        pytest.raises(DataError, match="otherwise than an OpenAI-compatible server"),
    ):
        judge(tmp_path, server)


def test_server_that_hangs(tmp_path: Path) -> None:
    """Who does not answer within timeout_s ends it with a message, and does not hold the command up."""
    write(tmp_path, BD=["a"], KD=["b"])
    started = time.monotonic()
    with judge_server(lambda number, body: "hang") as server, pytest.raises(ClusterError, match="in 2 tries"):
        judge(tmp_path, server, timeout_s=0.5, max_retries=1)
    assert time.monotonic() - started < 10


def test_server_that_goes_away(tmp_path: Path) -> None:
    """Three questions without an answer end the call; what there is counts, and the next call does the rest."""
    write(tmp_path, BD=[f"{i}!" for i in range(10)], KD=[f"{i}" for i in range(10)])
    with judge_server(lambda number, body: 503 if number > 8 else None) as server:
        rates, pair = judge(tmp_path, server, concurrency=1)
        assert len(server.bodies) == 8 + 3
        assert (pair.num_judged, pair.win_rate) == (4, 1.0)
        assert pair.not_judged == {NO_ANSWER: 2, NOT_ASKED: 4}
        assert rates.num_missing == 6
        assert "status 503" in str(rates.stopped)
        server.behaviour = lambda number, body: None
        rates, pair = judge(tmp_path, server)
        assert (pair.num_judged, pair.not_judged, rates.stopped) == (10, {}, None)
        assert len(server.bodies) == 11 + 12


def test_one_question_without_an_answer_does_not_stop_the_others(tmp_path: Path) -> None:
    """A server that fails on one prompt is asked about all others, and the missing one is told."""
    write(tmp_path, BD=[f"a{i}!" for i in range(8)], KD=[f"a{i}" for i in range(8)])
    with judge_server(lambda number, body: 500 if "a3" in body["messages"][0]["content"] else None) as server:
        rates, pair = judge(tmp_path, server, concurrency=1)
    assert (pair.num_judged, pair.not_judged, rates.num_missing) == (7, {NO_ANSWER: 1}, 1)


@pytest.mark.parametrize(
    ("options", "asked"),
    # A request takes 101 tokens here: after five of them 505 are used.
    [({"max_requests": 5}, 5), ({"max_tokens": 500, "concurrency": 1}, 5)],
)
def test_budget(tmp_path: Path, options: dict[str, int], asked: int) -> None:
    """A call stops where its budget ends, says so, and keeps what it has; calls after it do the rest."""
    write(tmp_path, BD=[f"{i}!" for i in range(4)], KD=[f"{i}" for i in range(4)])
    with judge_server() as server:
        rates, pair = judge(tmp_path, server, **options)
        assert len(server.bodies) == asked
        # The shortest question first, then the orders of a prompt together: 5 verdicts are at least 2 prompts.
        assert pair.num_judged == 2
        assert rates.num_missing == pair.not_judged[NOT_ASKED] == 2
        assert f"--{next(iter(options))}" in str(rates.stopped)
        rates, pair = judge(tmp_path, server, **options)
        assert (pair.num_judged, rates.num_missing, rates.stopped) == (4, 0, None)
        assert len(server.bodies) == 8


def test_token_budget_needs_a_server_that_counts(tmp_path: Path) -> None:
    """A budget that could not be kept is refused after one request."""
    write(tmp_path, BD=["a", "b"], KD=["c", "d"])
    with judge_server() as server:
        server.usage = False
        with pytest.raises(ConfigError, match="give --max_requests instead"):
            judge(tmp_path, server, max_tokens=10_000)
        assert len(server.bodies) == 1
        rates, _ = judge(tmp_path, server)
        assert (rates.num_missing, rates.usage.prompt_tokens) == (0, 0)


def command(folder: Path, server: JudgeServer, *flags: str) -> list[str]:
    files = [str(folder / f"{label}.responses.jsonl") for label in PAIR]
    given = ["--api_base", server.url, "--model", "rule", "--output_dir", str(folder / "judge"), *flags]
    return [*files, *given]


def test_killed_judge_goes_on(tmp_path: Path) -> None:
    """SIGKILL in the middle: no judgement that was kept is asked for again, and the figures are those of one run."""
    write(tmp_path, BD=[f"{i}!" for i in range(40)], KD=[f"{i}" for i in range(40)])
    with judge_server(slow(0.02)) as server:
        arguments = command(tmp_path, server, "--concurrency", "4")
        log = (tmp_path / "log").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "openrlhf_bd.cli.main", "judge", *arguments], stdout=log, stderr=log
        )
        path, deadline = tmp_path / "judge" / JUDGEMENTS_FILE, time.monotonic() + 60
        while not path.exists() or path.read_bytes().count(b"\n") < 20:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
        log.close()
        time.sleep(0.5)
        # What a kill inside a write leaves.
        with path.open("ab") as file:
            file.write(b'{"key": "cut')
        num_kept, num_asked = path.read_bytes().count(b"\n"), len(server.bodies)
        assert num_kept < 80
        assert main(arguments) == 0
        # Only what was on the way at the kill comes twice.
        assert num_asked - num_kept <= 4
        assert len(server.bodies) == num_asked + 80 - num_kept
        assert sorted(server.asked.values())[:num_kept] == [1] * num_kept
    assert len({line["key"] for line in lines(tmp_path)}) == len(lines(tmp_path)) == 80
    assert WinRates.read(tmp_path / "judge").pairs[0].win_rate == 1.0


def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command prints the table and what is missing, ends with 75 until all is judged, and tells no key."""
    write(tmp_path, BD=["a!", "b!", ""], KD=["a", "b", "c!"])
    with judge_server() as server:
        arguments = command(tmp_path, server)
        assert main([*arguments, "--max_requests", "3"]) == 75
        printed = capfd.readouterr()
        assert "2 of 3 comparisons are missing: the budget of --max_requests 3" in printed.err
        assert main(arguments) == 0
        printed = capfd.readouterr()
        assert "66.7" in printed.out
        assert "1 responses of BD are empty" in printed.out
        assert server.keys == {KEY}
    everything = printed.out + printed.err + (tmp_path / "judge" / JUDGEMENTS_FILE).read_text()
    assert KEY not in everything + (tmp_path / "judge" / "win_rates.json").read_text()


def test_command_line_refuses(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, equal labels, no key for OpenAI's server and a wrong value are messages, before anything is asked."""
    files = [str(path) for path in write(tmp_path, BD=["a"], KD=["b"]).values()]
    output = ["--output_dir", str(tmp_path / "judge")]
    monkeypatch.delenv("OPENAI_API_KEY")
    for arguments, message in (
        (files[:1], "at least two"),
        ([*files, "--labels", "x,x"], "two runs are called 'x'"),
        ([*files, "--labels", "x"], "1 names for 2 runs"),
        (files, "OPENAI_API_KEY is not set"),
        ([*files, "--concurrency", "0"], "--concurrency is '0'; expected a whole number greater than 0"),
        ([*files, "--api_base", "http://me:secret@host/v1"], "without user, password"),
        ([*files, "--test_set", "vicuna"], "it has dolly, seed 10, top-p 1"),
    ):
        assert main([*arguments, *output]) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "judge").exists()


# ---------------------------------------------------------------------------------------------------------------------
# vLLM's own server


TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A judge with random weights, with room for a question of its 600-word tokenizer."""
    folder = tmp_path_factory.mktemp("judge-server")
    model = folder / "model"
    shape = ["--hidden_size", "64", "--num_layers", "1", "--num_heads", "2", "--num_kv_heads", "1"]
    assert new_model(["--tokenizer", str(TEACHER_FOLDER), "--output_dir", str(model), *shape, "--max_len", "1024"]) == 0
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    flags = ("--max-model-len", "1024", "--chat-template", str(folder / "template.jinja"))
    with vllm_server(model, *flags, name="tiny", key=KEY, log=folder / "log") as url:
        yield f"{url}/v1"


def test_vllm_constrained(tmp_path: Path, vllm_url: str) -> None:
    """A local vLLM server that may only answer A, B or Tie judges everything, and a second call asks nothing."""
    write(tmp_path, BD=["yes", "2 + 2 is 4", "no"], KD=["no", "4", "yes"])
    server = JudgeServer(vllm_url)
    options: dict[str, Any] = {"model": "tiny", "constrained": True, "timeout_s": 120.0}
    rates, pair = judge(tmp_path, server, **options)
    assert (pair.num_judged, pair.not_judged, rates.stopped) == (3, {}, None)
    assert {line["verdict"] for line in lines(tmp_path)} <= {"A", "B", "Tie"}
    assert rates.usage.prompt_tokens > 6 * 50
    again, _ = judge(tmp_path, JudgeServer("http://127.0.0.1:9/v1"), **options)
    assert again == rates


def test_vllm_that_says_anything(tmp_path: Path, vllm_url: str) -> None:
    """A judge with random weights, free to say anything, judges nothing: no verdict is read into it."""
    write(tmp_path, BD=["yes", "no"], KD=["no", "yes"])
    _, pair = judge(tmp_path, JudgeServer(vllm_url), model="tiny", timeout_s=120.0, max_asks=2)
    assert (pair.num_judged, pair.not_judged, pair.win_rate) == (0, {NO_VERDICT: 2}, None)
    assert all(len(line["answers"]) == 2 for line in lines(tmp_path))


def test_vllm_refusals(tmp_path: Path, vllm_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong key, a model that is not there and a question beyond its context have a message each."""
    write(tmp_path, BD=["yes", "word " * 3000], KD=["no", "yes"])
    server = JudgeServer(vllm_url)
    _, pair = judge(tmp_path, server, model="tiny", constrained=True, timeout_s=120.0)
    assert (pair.num_judged, pair.not_judged) == (1, {REFUSED: 1})
    (tmp_path / "judge" / "win_rates.json").unlink()
    with pytest.raises(ConfigError, match="expected a model 'large' there"):
        judge(tmp_path, server, model="large")
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(ConfigError, match="status 401"):
        judge(tmp_path, server, model="tiny", constrained=True)
