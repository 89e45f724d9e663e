"""A teacher behind vLLM's real server on CPU: sets against a float64 reference, faults on the way, whole jobs."""

# S states, V vocabulary, K tokens that the server tells of a state

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from teacher_server import Proxy, faulty_proxy, vllm_server
from tiny_job import run_job
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from openrlhf_bd.demo.tokenizer import save_tokenizer, train_tokenizer
from openrlhf_bd.endpoint import ApiOptions
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.errors import ClusterError, ConfigError, DataError
from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreReader, incomplete_share
from openrlhf_bd.teacher.remote import RemoteOptions, RemoteTeacher
from openrlhf_bd.teacher.requests import RolloutRequest

pytestmark = pytest.mark.integration

# The tokenizer has 600 tokens; the model pads its vocabulary, as real ones do.
V = 608
# The end of text, and an ordinary token that a random model takes more often.
STOP_IDS = (0, 7)
POSITIONS = 96
KEY = "sk-never-to-be-written-down"
# Boundaries closer than this in mass, and logits closer than this at them, are within what float32 decides.
NOISE = 2e-5


@dataclass(frozen=True)
class Server:
    """The model's folder, the server and the proxy in front of it."""

    model: Path
    url: str
    proxy: Proxy


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    model = save_model(folder / "model", seed=0)
    with (
        vllm_server(model, "--max-model-len", str(POSITIONS), name="tiny", key=KEY, log=folder / "log") as url,
        faulty_proxy(url) as proxy,
    ):
        yield Server(model, url, proxy)


def save_model(folder: Path, *, seed: int, num_records: int = 300) -> Path:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        # Distributions from peaked to flat, so that K tokens suffice at some states and not at others.
        initializer_range=0.35,
    )
    model = Qwen2ForCausalLM(config)
    # A server takes these for its defaults: requests must say otherwise.
    model.generation_config = GenerationConfig(eos_token_id=list(STOP_IDS), do_sample=True, temperature=0.3, top_k=5)
    model.save_pretrained(folder)
    save_tokenizer(train_tokenizer(num_records=num_records), folder)
    return folder


def teacher(url: str, *, top_p: float = 0.8, k: int = 20, retries: int = 6, concurrency: int = 16) -> RemoteTeacher:
    record = RecordOptions(top_p, STOP_IDS)
    api = ApiOptions(f"{url}/v1", KEY, timeout_s=60.0, max_retries=retries)
    return RemoteTeacher(RemoteOptions(api, "tiny", POSITIONS, k, concurrency, STOP_IDS, record))


def requests(num_requests: int, *, seed: int, max_new_tokens: int = 30) -> list[RolloutRequest]:
    """Random prompts of 1 to 40 tokens; seeds from all of their range."""
    rng = np.random.default_rng(seed)
    return [
        RolloutRequest(
            f"p{index}:0",
            rng.integers(10, 600, size=rng.integers(1, 41)).astype(np.int32),
            int(rng.integers(2**63)),
            max_new_tokens,
        )
        for index in range(num_requests)
    ]


class Reference:
    """The teacher's log-probabilities by transformers in float64."""

    def __init__(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)

    @torch.no_grad()
    def logprobs_SV(self, rollout: Rollout) -> NDArray[np.float64]:
        assert rollout.sets is not None
        tokens = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.response_ids]).astype(np.int64))
        first = len(rollout.prompt_ids) - 1
        logits_SV = self.model(tokens[None]).logits[0, first : first + rollout.sets.num_states]
        return torch.log_softmax(logits_SV, dim=-1).numpy()


@dataclass
class Comparison:
    complete: int = 0
    incomplete: int = 0
    ambiguous: int = 0
    mismatches: int = 0


def compare(rollouts: Sequence[Rollout], reference: Reference, *, top_p: float, k: int) -> Comparison:
    """Compare every state with the brute force, cut at K."""
    counts = Comparison()
    for rollout in rollouts:
        assert rollout.sets is not None
        assert rollout.logprobs_T is not None
        logprobs_SV = reference.logprobs_SV(rollout)
        taken_logprobs = logprobs_SV[np.arange(len(rollout.response_ids)), rollout.response_ids]
        np.testing.assert_allclose(rollout.logprobs_T, taken_logprobs, atol=2e-4)
        taken = [*rollout.response_ids.tolist(), -1]
        for state, logprobs_V in enumerate(logprobs_SV):
            _compare_state(rollout.sets, state, logprobs_V, taken[state], counts, top_p=top_p, k=k)
    return counts


def _compare_state(
    sets: RecordedSets,
    state: int,
    logprobs_V: NDArray[np.float64],
    taken: int,
    counts: Comparison,
    *,
    top_p: float,
    k: int,
) -> None:
    span = slice(sets.offsets[state], sets.offsets[state + 1])
    ids = sets.ids_M[span].tolist()
    assert sets.logprobs_M is not None
    np.testing.assert_allclose(sets.logprobs_M[span], logprobs_V[ids], atol=2e-4)
    np.testing.assert_allclose(sets.neg_log_mass_S[state], -np.log(np.exp(logprobs_V[ids]).sum()), atol=2e-4)
    order = np.argsort(-logprobs_V, kind="stable")
    mass = np.cumsum(np.exp(logprobs_V[order]))
    whole_size = int((mass < top_p).sum()) + 1
    size = min(whole_size, k)
    gaps = -np.diff(logprobs_V[order[: k + 1]])
    if np.abs(mass - top_p).min() < NOISE or min(gaps[size - 1], gaps[k - 1]) < NOISE:
        counts.ambiguous += 1
        return
    counts.complete += whole_size <= k
    counts.incomplete += whole_size > k
    # Stop tokens outside are known where they are among the K, or taken.
    stops = [token for token in order.tolist() if token in STOP_IDS and token not in order[:size]]
    known = [token for token in stops if token in order[:k] or token == taken]
    # The mass says whether the set is whole, unless known stop tokens fill it up.
    says_whole = bool(np.exp(-sets.neg_log_mass_S[state]) >= top_p)
    tells = says_whole == (whole_size <= k) or bool(known)
    counts.mismatches += not (set(ids[:size]) == set(order[:size].tolist()) and ids[size:] == known and tells)


@pytest.fixture(scope="module")
def rollouts(server: Server) -> list[Rollout]:
    return teacher(server.url).generate_rollouts(requests(48, seed=1), temperature=1.0, top_p=1.0)


@pytest.fixture(scope="module")
def reference(server: Server) -> Reference:
    return Reference(server.model)


def test_sets_equal_a_float64_brute_force_cut_at_k(rollouts: list[Rollout], reference: Reference) -> None:
    """Where K tokens hold p the set is the exact one, elsewhere it is the K tokens and its mass tells."""
    counts = compare(rollouts, reference, top_p=0.8, k=20)
    assert counts.mismatches == 0
    assert counts.complete > 200
    assert counts.incomplete > 300
    assert counts.ambiguous < (counts.complete + counts.incomplete) / 20


def test_sampler_options_do_not_change_what_is_recorded(server: Server, reference: Reference) -> None:
    """At temperature 0.6 and nucleus 0.9, with K = 5, the sets are still those of temperature 1."""
    asked = requests(16, seed=2)
    sampled = teacher(server.url, k=5, top_p=0.5).generate_rollouts(asked, temperature=0.6, top_p=0.9)
    counts = compare(sampled, reference, top_p=0.5, k=5)
    assert counts.mismatches == 0
    assert counts.complete > 100


def test_scoring_gives_the_sets_of_generation(server: Server, rollouts: list[Rollout], reference: Reference) -> None:
    """The prompt's log-probabilities of given tokens give the same sets as sampling them did."""
    bare = [Rollout(row.row_id, row.prompt_ids, row.response_ids, row.finish_reason) for row in rollouts]
    scored = teacher(server.url).score(bare)
    assert compare(scored, reference, top_p=0.8, k=20).mismatches == 0
    for row, again in zip(rollouts, scored, strict=True):
        assert row.sets is not None
        assert again.sets is not None
        np.testing.assert_array_equal(again.response_ids, row.response_ids)
        assert again.sets.num_states == row.sets.num_states


def test_scores_alone_need_no_sets(server: Server, rollouts: list[Rollout], reference: Reference) -> None:
    """Without sets the tokens' own log-probabilities are there, under another prompt of the teacher too."""
    other = np.arange(20, 25, dtype=np.int32)
    options = replace(teacher(server.url)._options, record=RecordOptions(top_p=None))
    scored = RemoteTeacher(options).score(rollouts[:2], [None, other])
    assert scored[0].sets is None
    np.testing.assert_allclose(scored[0].logprobs_T, rollouts[0].logprobs_T, atol=2e-4)
    seen = replace(rollouts[1], prompt_ids=other)
    expected = reference.logprobs_SV(seen)[np.arange(len(seen.response_ids)), seen.response_ids]
    np.testing.assert_allclose(scored[1].logprobs_T, expected, atol=2e-4)
    assert scored[1].teacher_prompt_hash is not None


def test_sets_of_p_of_one_ask_for_nothing_more(server: Server, reference: Reference) -> None:
    """With p = 1 sets list no ids, and the taken tokens' own log-probabilities are there."""
    [row] = teacher(server.url, top_p=1.0).generate_rollouts(requests(1, seed=5), temperature=1.0, top_p=1.0)
    assert row.sets is not None
    assert row.sets.is_whole
    num_tokens = len(row.response_ids)
    assert row.sets.num_states == num_tokens + (row.finish_reason == "length")
    expected = reference.logprobs_SV(row)[np.arange(num_tokens), row.response_ids]
    np.testing.assert_allclose(row.logprobs_T, expected, atol=2e-4)


def test_responses_end_as_they_do_in_an_engine(rollouts: list[Rollout]) -> None:
    """A stop token ends and belongs to a response of T sets; a cut response has T + 1, with the state after it."""
    stopped = [row for row in rollouts if row.finish_reason == "stop"]
    cut = [row for row in rollouts if row.finish_reason == "length"]
    assert stopped
    assert cut
    for row in rollouts:
        assert row.sets is not None
        num_tokens = len(row.response_ids)
        assert not set(row.response_ids[:-1].tolist()) & set(STOP_IDS)
        assert (int(row.response_ids[-1]) in STOP_IDS) == (row.finish_reason == "stop")
        assert row.sets.num_states == num_tokens + (row.finish_reason == "length")
        assert num_tokens <= 30


def test_response_that_fills_the_model(server: Server) -> None:
    """Where the model has no further position a cut response has T sets; and it can not be scored, which is said."""
    prompt = np.arange(20, 60, dtype=np.int32)
    full = [RolloutRequest(f"full:{seed}", prompt, seed, POSITIONS - 40) for seed in range(8)]
    made = teacher(server.url).generate_rollouts(full, temperature=1.0, top_p=1.0)
    row = next(row for row in made if row.finish_reason == "length")
    assert row.sets is not None
    assert row.sets.num_states == len(row.response_ids) == POSITIONS - 40
    with pytest.raises(DataError, match=f"{row.row_id}.*less than 96 in all"):
        teacher(server.url).score([row])


def test_overload_and_closed_connections_lose_no_row(server: Server) -> None:
    """Requests that meet 429, 503 or a closed connection come again, and each row is made once."""
    seen: dict[str, int] = {}

    def fault(path: str, body: dict[str, Any]) -> str | int | None:
        tries = seen[str(body["prompt"])] = seen.get(str(body["prompt"]), 0) + 1
        kind: tuple[str | int, ...] = ("close", 429, 503)
        return kind[len(body["prompt"]) % 3] if tries <= 2 else None

    server.proxy.reset(fault)
    asked = requests(12, seed=3, max_new_tokens=4)
    made = teacher(server.proxy.url).generate_rollouts(asked, temperature=1.0, top_p=1.0)
    assert [row.row_id for row in made] == [request.row_id for request in asked]
    assert all(server.proxy.fired[kind] >= 2 for kind in ("close", "429", "503"))
    assert sum(server.proxy.fired.values()) == 24
    assert server.proxy.passed == 12


def test_answer_that_does_not_come_is_asked_for_again(server: Server) -> None:
    """A server that keeps a request too long is given up on, and asked once more."""
    server.proxy.reset(lambda path, body: None if server.proxy.fired else "hang")
    options = teacher(server.proxy.url)._options
    patient = RemoteTeacher(replace(options, api=replace(options.api, timeout_s=3.0, max_retries=1)))
    [row] = patient.generate_rollouts(requests(1, seed=4, max_new_tokens=2), temperature=1.0, top_p=1.0)
    assert len(row.response_ids)
    assert server.proxy.fired["hang"] == 1


def test_server_that_stays_away_is_an_error_that_names_it(server: Server) -> None:
    """After its tries a client gives up with a status that says: run the same command again."""
    server.proxy.reset(lambda path, body: "close")
    with pytest.raises(ClusterError, match=f"row p0:0: no answer from {server.proxy.url}/v1 in 2 tries") as raised:
        teacher(server.proxy.url, retries=1).generate_rollouts(requests(1, seed=4), temperature=1.0, top_p=1.0)
    assert raised.value.exit_status == 75
    assert server.proxy.fired["close"] == 2


def test_wrong_key_is_an_error_that_names_the_variable(server: Server) -> None:
    """The server refuses another key at once; no message has a key."""
    options = teacher(server.url)._options
    stranger = RemoteTeacher(replace(options, api=replace(options.api, key="sk-wrong")))
    with pytest.raises(ConfigError, match=r"status 401.*OPENAI_API_KEY") as raised:
        stranger.generate_rollouts(requests(1, seed=4), temperature=1.0, top_p=1.0)
    assert "sk-wrong" not in str(raised.value) + repr(options)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        (("return_tokens_as_token_ids", "return_token_ids"), "for a token, expected its id"),
        (("logprobs",), "no log-probabilities"),
    ],
)
def test_server_without_ids_or_logprobs_is_refused(server: Server, left_out: tuple[str, ...], message: str) -> None:
    """What a server ignores of a request is found in its answer."""
    server.proxy.reset(lambda path, body: {key: body[key] for key in body if key not in left_out})
    with pytest.raises(DataError, match=message):
        teacher(server.proxy.url).generate_rollouts(requests(1, seed=4), temperature=1.0, top_p=1.0)
    assert server.proxy.fired["body"] == 1


def test_response_that_ends_by_another_rule_is_refused(server: Server) -> None:
    """A server that stops at tokens of its own, or cuts by a limit of its own, is found."""
    strict = RemoteTeacher(replace(teacher(server.url)._options, stop_token_ids=(0,)))
    with pytest.raises(DataError, match=r"ended the response by token 7, expected one of \[0\]"):
        strict.generate_rollouts(requests(48, seed=1), temperature=1.0, top_p=1.0)
    server.proxy.reset(lambda path, body: {**body, "max_tokens": 1, "ignore_eos": True, "stop_token_ids": []})
    with pytest.raises(DataError, match="cut the response at 1 tokens, expected the 31 asked for"):
        teacher(server.proxy.url).generate_rollouts(requests(1, seed=4), temperature=1.0, top_p=1.0)


@pytest.fixture
def job(server: Server, tmp_path: Path) -> list[str]:
    """Flags of a generation job: 24 rows of the tiny teacher behind the proxy, K = 4."""
    server.proxy.reset(lambda path, body: None)
    records = [{"input": f"What is {n} plus {n}?", "output": str(2 * n)} for n in range(12)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    flags = {
        "teacher.api_base": f"{server.proxy.url}/v1",
        "teacher.api_top_logprobs": "4",
        "teacher.api_concurrency": "2",
        "teacher.api_max_retries": "1",
        "teacher.rows_per_shard": "4",
        "actor.model_name_or_path": str(server.model),
        "algo.distill.top_p": "0.6",
        "rollout.n_samples_per_prompt": "2",
        "rollout.max_new_tokens": "8",
        "data.prompt_dataset": str(data),
        "data.max_len": "64",
        "ckpt.output_dir": str(tmp_path / "run"),
    }
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    return kept | {"OPENAI_API_KEY": KEY}


def generate(job: list[str], *changes: str) -> tuple[int, str]:
    done = run_job(*job, *changes, module="openrlhf_bd.cli.generate_teacher", environment=environment())
    return done.returncode, done.stdout


def test_job_goes_on_where_the_server_went_away(
    server: Server, job: list[str], tmp_path: Path, reference: Reference
) -> None:
    """The server dies in mid-job: status 75; the same command makes the other rows, each once, and leaks no key."""
    store = tmp_path / "run" / "teacher_data"
    server.proxy.reset(lambda path, body: "close" if server.proxy.passed >= 14 else None)
    status, output = generate(job)
    assert status == 75, output
    assert server.proxy.fired["close"] >= 2
    assert "no answer from" in output
    sealed = {path.name: path.read_bytes() for path in store.glob("shard-*")}
    assert sealed

    server.proxy.reset(lambda path, body: None)
    status, output = generate(job)
    assert status == 0, output
    words = " ".join(output.split())
    assert re.search(r"\d % of the candidate sets so far are incomplete: the 4 tokens", words), output
    reader = StoreReader(store)
    assert sorted(row.row_id for batch in reader.scan() for row in batch) == sorted(
        f"{prompt:08d}:{sample}" for prompt in range(12) for sample in range(2)
    )
    assert {name: (store / name).read_bytes() for name in sealed} == sealed

    rows = [row for batch in reader.scan() for row in batch]
    whole = [
        (np.sort(np.exp(logprobs_V))[-4:].sum() >= 0.6) for row in rows for logprobs_V in reference.logprobs_SV(row)
    ]
    share = incomplete_share(reader, top_p=0.6)
    assert share is not None
    assert 0.1 < share < 0.9
    # A stop token that is known fills up a few sets.
    assert share == pytest.approx(1 - np.mean(whole), abs=0.02)
    assert reader.manifest.max_candidates == 4
    assert reader.manifest.fingerprints["teacher"] == "served:tiny"

    seen = run_job(str(store), module="openrlhf_bd.cli.inspect_store").stdout
    assert re.search(rf"incomplete\W+{share:.2%} of the sets", seen), seen
    texts = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(KEY.encode() in text for text in [*texts, output.encode(), seen.encode()])


def test_checks_before_the_first_actor(server: Server, job: list[str], tmp_path: Path) -> None:
    """Whatever the server cannot do is said with status 2 before anything starts or is written."""
    other = save_model(tmp_path / "other", seed=1, num_records=40)
    cases = {
        ("--teacher.api_model", "large"): "serves tiny",
        ("--teacher.api_top_logprobs", "21"): "greater than max allowed: 20",
        ("--actor.model_name_or_path", str(other)): "tokenizers of teacher tiny.*differ",
        ("--data.max_len", "200"): "takes 96 tokens, expected at least 200",
        ("--teacher.api_base", "http://127.0.0.1:9/v1"): "no answer from http://127.0.0.1:9/v1",
        ("--teacher.api_base", "http://me:secret@127.0.0.1/v1"): "without user, password",
        ("--teacher.model_name_or_path", str(server.model)): "leave one of them out",
        ("--teacher.api_timeout_s", "3000"): "longer than --cluster.generate_timeout_s",
    }
    from openrlhf_bd.cli.generate_teacher import main

    for change, message in cases.items():
        status, output = _in_process(main, [*job, *change])
        assert status == 2, (change, output)
        assert re.search(message, output), (change, output)
        assert "secret" not in output
    assert not (tmp_path / "run").exists()
    assert server.proxy.passed <= 4 * len(cases)


def _in_process(main: Any, argv: list[str]) -> tuple[int, str]:
    import contextlib
    import io

    output = io.StringIO()
    before = os.environ.get("OPENAI_API_KEY")
    os.environ["OPENAI_API_KEY"] = KEY
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = main(argv)
    finally:
        os.environ.pop("OPENAI_API_KEY")
        if before is not None:
            os.environ["OPENAI_API_KEY"] = before
    return status, " ".join(output.getvalue().split())


def test_training_on_incomplete_sets(server: Server, job: list[str], tmp_path: Path) -> None:
    """The whole job learns from a server's sets, tells how many are incomplete, and scores by the same server."""
    data = str(tmp_path / "train.jsonl")
    flags = ["--actor.num_gpus_per_node", "1", "--train.batch_size", "12", "--train.max_steps", "2"]
    flags += ["--ds.param_dtype", "fp32", "--eval.test_datasets", f"test={data}", "--eval.seeds", "10"]
    flags += ["--eval.max_new_tokens", "8", "--eval.teacher_nll", "true", "--algo.distill.top_p", "0.9"]
    flags += ["--data.label_key", "output"]
    done = run_job(*job, *flags, environment=environment())
    assert done.returncode == 0, done.stdout
    words = " ".join(done.stdout.split())
    assert re.search(rf"teacher: tiny at {server.proxy.url}/v1, 1 x 2 requests at once", words), words
    assert re.search(r"\d+\.\d% of the candidate sets of \S+ are incomplete: the 4 likeliest tokens", words), words
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics
    scores = (tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8")
    assert "teacher_nll" in scores
    assert KEY not in done.stdout

    # Finished rows need no server, where the model's name is given.
    server.proxy.reset(lambda path, body: "close")
    status, output = generate(
        job,
        "--algo.distill.top_p",
        "0.9",
        "--teacher.api_model",
        "tiny",
        "--ckpt.output_dir",
        str(tmp_path / "again"),
        "--teacher.store_path",
        str(tmp_path / "run" / "teacher_data"),
    )
    assert status == 0, output
    assert not server.proxy.fired
