"""A real vLLM engine in a real Ray actor: candidate sets against a float64 reference, resume, weights switched.

The models are tiny Qwen2s with random weights, made here. One actor serves the whole module; where a test needs another
engine (a smaller cache, another model), it is restarted inside the actor.
"""

# P prompt tokens, T response tokens, S states, V vocabulary

import itertools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from openrlhf_bd.config import Config
from openrlhf_bd.engines.actor import Completion
from openrlhf_bd.engines.arguments import RecordOptions, engine_arguments, engine_environment
from openrlhf_bd.errors import ClusterError, DataError
from openrlhf_bd.records import Prompt, RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter
from openrlhf_bd.teacher.engine import TeacherEngine
from openrlhf_bd.teacher.generate import generate_teacher_data
from openrlhf_bd.teacher.requests import RolloutRequest

pytestmark = pytest.mark.integration

V = 331
STOP_IDS = [3, 7]
TOP_P = 0.8
MAX_LEN = 95
POSITIONS = 96
TIMEOUT_S = 300.0
# Boundaries closer than this in mass, and logits closer than this at them, are within what float32 decides.
NOISE = 2e-5
# Of the teacher's cache: 32 tokens, keys and values, 2 layers, 1 head of 32, float32.
BLOCK_BYTES = 32 * 2 * 2 * 1 * 32 * 4
ROOT = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class Models:
    """Folders of the models."""

    teacher: str
    untied: str
    gpt2: str


@dataclass(frozen=True)
class Teacher:
    """The actor, with its arguments as the module's tests expect to find it."""

    actor: Any
    arguments: dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    return Models(
        teacher=save(qwen2(seed=0, num_layers=2, tied=True), folder / "teacher"),
        untied=save(qwen2(seed=1, num_layers=3, tied=False), folder / "untied"),
        gpt2=save(gpt2(seed=2), folder / "gpt2"),
    )


def qwen2(*, seed: int, num_layers: int, tied: bool) -> PreTrainedModel:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=V,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=tied,
            # Wide enough that distributions range from peaked to flat.
            initializer_range=0.3,
        )
    )


def gpt2(*, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=64, n_layer=2, n_head=2, n_positions=POSITIONS, initializer_range=0.3)
    )


def save(model: PreTrainedModel, folder: Path) -> str:
    model.generation_config = GenerationConfig(eos_token_id=STOP_IDS, pad_token_id=0)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(models: Models) -> Iterator[Teacher]:
    # A short path: Ray puts Unix sockets below it, whose names may have 107 bytes.
    ray_folder = tempfile.mkdtemp(prefix="bd-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": ROOT}},
        _temp_dir=ray_folder,
    )
    record = RecordOptions(TOP_P, tuple(STOP_IDS), logprobs=True)
    arguments = engine_arguments(models.teacher, max_model_len=MAX_LEN, max_num_seqs=32, seed=0, record=record)
    try:
        yield Teacher(teacher_actor(arguments), arguments)
    finally:
        ray.shutdown()
        shutil.rmtree(ray_folder, ignore_errors=True)


def teacher_actor(arguments: dict[str, Any]) -> Any:
    actor_class = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(TeacherEngine)
    environment = engine_environment(arguments["llm"]["model"])
    return actor_class.options(runtime_env={"env_vars": environment}).remote(arguments)


def get(ref: Any) -> Any:
    return ray.get(ref, timeout=TIMEOUT_S)


def restart(teacher: Teacher, **llm: Any) -> None:
    """Start the actor's engine anew, with changed arguments of vLLM."""
    arguments = {**teacher.arguments, "llm": {**teacher.arguments["llm"], **llm}}

    def start_with(engine: Any, arguments: dict[str, Any]) -> None:
        engine.shutdown()
        engine.arguments = arguments
        engine._start()

    get(teacher.actor.__ray_call__.remote(start_with, arguments))


def num_preemptions(teacher: Teacher) -> int:
    def read(engine: Any) -> int:
        return sum(int(metric.value) for metric in engine.llm.get_metrics() if metric.name == "vllm:num_preemptions")

    return get(teacher.actor.__ray_call__.remote(read))


def requests(num_requests: int, *, seed: int, max_new_tokens: int = 40) -> list[RolloutRequest]:
    """Random prompts of 1 to 40 tokens; some share a prefix."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(10, V, size=33)
    prompts = [rng.integers(10, V, size=rng.integers(1, 41)) for _ in range(num_requests)]
    prompts[::4] = [np.concatenate([prefix, prompt])[:50] for prompt in prompts[::4]]
    return [
        RolloutRequest(f"p{index}:0", prompt.astype(np.int32), 1000 * seed + index, max_new_tokens)
        for index, prompt in enumerate(prompts)
    ]


def generate(
    teacher: Teacher, asked: Sequence[RolloutRequest], *, temperature: float = 1.0, top_p: float = 1.0
) -> list[Rollout]:
    return get(teacher.actor.generate_rollouts.remote(list(asked), temperature=temperature, top_p=top_p))


class Reference:
    """What the recorded sets must be, by transformers in float64."""

    def __init__(self, model_path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)

    @torch.no_grad()
    def state_logprobs(self, rollout: Rollout, num_states: int) -> NDArray[np.float64]:
        tokens = np.concatenate([rollout.prompt_ids, rollout.response_ids]).astype(np.int64)
        logits_1LV = self.model(torch.from_numpy(tokens)[None]).logits
        first = len(rollout.prompt_ids) - 1
        return torch.log_softmax(logits_1LV[0, first : first + num_states], dim=-1).numpy()


@dataclass
class Comparison:
    compared: int = 0
    ambiguous: int = 0
    mismatches: int = 0


def compare(rollouts: Sequence[Rollout], reference: Reference) -> Comparison:
    """Compare every recorded state with the brute force; masses and log-probabilities are asserted on the way."""
    counts = Comparison()
    for rollout in rollouts:
        assert rollout.sets is not None
        assert rollout.logprobs_T is not None
        logprobs_SV = reference.state_logprobs(rollout, rollout.sets.num_states)
        taken_logprobs = logprobs_SV[np.arange(len(rollout.response_ids)), rollout.response_ids]
        np.testing.assert_allclose(rollout.logprobs_T, taken_logprobs, atol=1e-4)
        for state, logprobs_V in enumerate(logprobs_SV):
            _compare_state(rollout.sets, state, logprobs_V, counts)
    return counts


def _compare_state(sets: RecordedSets, state: int, logprobs_V: NDArray[np.float64], counts: Comparison) -> None:
    span = slice(sets.offsets[state], sets.offsets[state + 1])
    ids = sets.ids_M[span]
    assert sets.logprobs_M is not None
    np.testing.assert_allclose(sets.logprobs_M[span], logprobs_V[ids], atol=1e-4)
    np.testing.assert_allclose(sets.neg_log_mass_S[state], -np.log(np.exp(logprobs_V[ids]).sum()), atol=1e-4)
    order = np.argsort(-logprobs_V, kind="stable")
    mass = np.cumsum(np.exp(logprobs_V[order]))
    size = int((mass < TOP_P).sum()) + 1
    gap = logprobs_V[order[size - 1]] - logprobs_V[order[size]]
    if np.abs(mass - TOP_P).min() < NOISE or gap < NOISE:
        counts.ambiguous += 1
        return
    counts.compared += 1
    always = [token for token in STOP_IDS if token not in order[:size]]
    always.sort(key=lambda token: -logprobs_V[token])
    in_order = (np.diff(sets.logprobs_M[span]) <= 0).all()
    same = set(ids[:size].tolist()) == set(order[:size].tolist()) and ids[size:].tolist() == always
    counts.mismatches += not (same and in_order)


@pytest.fixture(scope="module")
def rollouts(teacher: Teacher) -> list[Rollout]:
    """64 rollouts at temperature 1."""
    return generate(teacher, requests(64, seed=1))


def test_recorded_sets_equal_a_float64_brute_force(rollouts: list[Rollout], models: Models) -> None:
    """Every set, mass and log-probability recorded while sampling is what the model's own logits say."""
    counts = compare(rollouts, Reference(models.teacher))
    assert counts.mismatches == 0
    assert counts.compared > 1000
    assert counts.ambiguous < counts.compared / 20


def test_sampler_options_do_not_change_what_is_recorded(teacher: Teacher, models: Models) -> None:
    """At temperature 0.6 and nucleus 0.9 the sets are still those of the raw logits at temperature 1."""
    sampled = generate(teacher, requests(24, seed=2), temperature=0.6, top_p=0.9)
    counts = compare(sampled, Reference(models.teacher))
    assert counts.mismatches == 0
    assert counts.compared > 300


def test_scoring_gives_the_sets_of_generation(teacher: Teacher, rollouts: list[Rollout], models: Models) -> None:
    """One pass over given tokens records the same sets and log-probabilities as sampling them did."""
    bare = [Rollout(row.row_id, row.prompt_ids, row.response_ids, row.finish_reason) for row in rollouts]
    scored = get(teacher.actor.score.remote(bare))
    counts = compare(scored, Reference(models.teacher))
    assert counts.mismatches == 0
    assert counts.compared > 1000
    for row, again in zip(rollouts, scored, strict=True):
        assert row.sets is not None
        assert again.sets is not None
        assert row.logprobs_T is not None
        assert again.logprobs_T is not None
        assert again.sets.num_states == row.sets.num_states
        np.testing.assert_array_equal(again.response_ids, row.response_ids)
        np.testing.assert_allclose(again.logprobs_T, row.logprobs_T, atol=1e-4)


def test_stop_token_ends_and_belongs_to_a_response(rollouts: list[Rollout]) -> None:
    """Each end-of-sequence id of the model stops a response and is its last token, with one set a token."""
    stopped = [row for row in rollouts if row.finish_reason == "stop"]
    assert {int(row.response_ids[-1]) for row in stopped} == set(STOP_IDS)
    for row in stopped:
        assert not set(row.response_ids[:-1].tolist()) & set(STOP_IDS)
        assert row.sets is not None
        assert row.sets.num_states == len(row.response_ids)


def test_cut_response_has_the_set_of_the_state_after_it(rollouts: list[Rollout]) -> None:
    """A response of max_new_tokens ends with "length" and T + 1 sets; none of its tokens is a stop."""
    cut = [row for row in rollouts if row.finish_reason == "length"]
    assert cut
    for row in cut:
        assert len(row.response_ids) == 40
        assert not set(row.response_ids.tolist()) & set(STOP_IDS)
        assert row.sets is not None
        assert row.sets.num_states == 41


def test_response_that_fills_the_model_has_no_state_after_it(teacher: Teacher, models: Models) -> None:
    """Where the model has no further position, a cut response has T sets, sampled and scored alike."""
    prompt_ids = np.arange(10, 20, dtype=np.int32)
    full = [RolloutRequest(f"full:{seed}", prompt_ids, seed, POSITIONS - 10) for seed in range(40)]
    cut = [row for row in generate(teacher, full) if row.finish_reason == "length"]
    assert cut
    scored = get(teacher.actor.score.remote(cut))
    for row in [*cut, *scored]:
        assert row.sets is not None
        assert row.sets.num_states == len(row.response_ids) == POSITIONS - 10
    assert compare([*cut, *scored], Reference(models.teacher)).mismatches == 0


def test_request_beyond_the_engine_is_refused(teacher: Teacher) -> None:
    """A prompt that leaves too little room is an error before anything is sampled, and the engine goes on."""
    too_long = RolloutRequest("long:0", np.arange(10, 60, dtype=np.int32), 0, 50)
    with pytest.raises(DataError, match="found 50 prompt tokens and 50 to sample"):
        generate(teacher, [too_long])
    assert len(generate(teacher, requests(2, seed=3))) == 2


def test_preemption_and_split_prompts_leave_no_gap_and_no_duplicate(teacher: Teacher, models: Models) -> None:
    """With a cache for a few sequences and prompts computed in pieces, the sets are still exact."""
    restart(
        teacher,
        kv_cache_memory_bytes=9 * BLOCK_BYTES,
        enable_chunked_prefill=True,
        max_num_batched_tokens=40,
        disable_log_stats=False,
    )
    try:
        # Greedy: on CPU vLLM cannot split the prompt of a request that has a seed of its own.
        sampled = generate(teacher, requests(32, seed=4), temperature=0.0)
        preemptions = num_preemptions(teacher)
        scored = get(teacher.actor.score.remote(sampled))
    finally:
        restart(teacher)
    assert preemptions > 0
    for rows in (sampled, scored):
        counts = compare(rows, Reference(models.teacher))
        assert counts.mismatches == 0
        assert counts.compared > 300


def test_preempted_random_samples_keep_their_sets(teacher: Teacher, models: Models) -> None:
    """Sampling at temperature 1 with preemption records exact sets of the tokens that were kept."""
    restart(teacher, kv_cache_memory_bytes=9 * BLOCK_BYTES, disable_log_stats=False)
    try:
        sampled = generate(teacher, requests(32, seed=5))
        preemptions = num_preemptions(teacher)
    finally:
        restart(teacher)
    assert preemptions > 0
    counts = compare(sampled, Reference(models.teacher))
    assert counts.mismatches == 0
    assert counts.compared > 300


def test_v2_model_runner_records_the_same_sets(teacher: Teacher, models: Models) -> None:
    """vLLM's runner for GPUs, its kernels interpreted on CPU: exact sets with split prompts and preemption."""

    class InterpretedTeacher(TeacherEngine):
        def __init__(self, arguments: dict[str, Any]) -> None:
            # vLLM uses Triton on CPU only with a CPU backend, and asks the package of its GPU build whether this is a
            # CPU. Interpreted kernels need no backend.
            import importlib.metadata
            from types import SimpleNamespace

            import triton.backends

            version = importlib.metadata.version
            importlib.metadata.version = lambda name: "0+cpu" if name == "vllm" else version(name)  # type: ignore
            triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
            super().__init__(arguments)

    environment = {**engine_environment(models.teacher), "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    arguments = {
        **teacher.arguments,
        "llm": {
            **teacher.arguments["llm"],
            "kv_cache_memory_bytes": 5 * BLOCK_BYTES,
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 40,
            "disable_log_stats": False,
            # The interpreter lacks a function of the noise in float32.
            "use_fp64_gumbel": True,
        },
    }
    actor_class = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(InterpretedTeacher)
    v2 = Teacher(actor_class.options(runtime_env={"env_vars": environment}).remote(arguments), arguments)
    assert get(v2.actor.__ray_call__.remote(lambda engine: engine.llm.llm_engine.vllm_config.use_v2_model_runner))
    sampled = generate(v2, requests(6, seed=8, max_new_tokens=16), temperature=0.8)
    assert num_preemptions(v2) > 0
    scored = get(v2.actor.score.remote(sampled))
    ray.kill(v2.actor)
    for rows in (sampled, scored):
        counts = compare(rows, Reference(models.teacher))
        assert counts.mismatches == 0
        assert counts.compared > 50


def test_load_switches_weights_and_architecture(teacher: Teacher, models: Models) -> None:
    """Greedy responses are those of the model loaded last: tied, untied, another architecture, and back."""
    answers = {}
    for path in (models.untied, models.gpt2, models.teacher):
        get(teacher.actor.load.remote(path))
        answers[path] = greedy(teacher)
        for completion, expected in zip(answers[path], greedy_by_transformers(path), strict=True):
            np.testing.assert_array_equal(completion.token_ids, expected)
            assert completion.finish_reason == ("stop" if expected[-1] in STOP_IDS else "length")
    for one, other in itertools.combinations(answers.values(), 2):
        assert any(not np.array_equal(a.token_ids, b.token_ids) for a, b in zip(one, other, strict=True))


def greedy(teacher: Teacher) -> list[Completion]:
    prompts = [request.prompt_ids.tolist() for request in requests(8, seed=6)]
    count = len(prompts)
    return get(
        teacher.actor.generate.remote(
            prompts, max_new_tokens=[20] * count, temperature=0.0, top_p=1.0, seeds=list(range(count))
        )
    )


def greedy_by_transformers(model_path: str) -> list[NDArray[np.int64]]:
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    expected = []
    for request in requests(8, seed=6):
        prompt_1P = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
        tokens_1L = model.generate(prompt_1P, max_new_tokens=20, do_sample=False)
        expected.append(tokens_1L[0, prompt_1P.shape[1] :].numpy())
    return expected


NUM_PROMPTS, NUM_SAMPLES = 24, 2


def job_config(*, timeout_s: float = TIMEOUT_S) -> Config:
    return Config.model_validate(
        {
            "rollout": {"n_samples_per_prompt": NUM_SAMPLES, "max_new_tokens": 20},
            "data": {"max_len": MAX_LEN},
            "teacher": {"max_num_seqs": 32},
            "cluster": {"generate_timeout_s": timeout_s},
        }
    )


def job_prompts() -> list[Prompt]:
    return [Prompt(f"q{index}", request.prompt_ids, {}) for index, request in enumerate(requests(NUM_PROMPTS, seed=7))]


def job_writer(path: Path) -> StoreWriter:
    manifest = StoreManifest(
        kind="teacher",
        top_p=TOP_P,
        always_include=tuple(STOP_IDS),
        has_logprobs=True,
        num_prompts=NUM_PROMPTS,
        n_samples_per_prompt=NUM_SAMPLES,
    )
    return StoreWriter(path, manifest, rows_per_shard=16)


class Interruption(Exception):  # noqa: N818
    """Stands for whatever ends a job in the middle."""


def test_job_fills_a_store_and_resumes_where_it_was_interrupted(
    teacher: Teacher, models: Models, tmp_path: Path
) -> None:
    """A job interrupted after two batches goes on with the missing rows; a further run generates nothing."""
    prompts, config, path = job_prompts(), job_config(), tmp_path / "store"
    committed: list[int] = []

    def stop_after_two(num_rows: int, note: str) -> None:
        committed.append(num_rows)
        if len(committed) == 2:
            raise Interruption

    with pytest.raises(Interruption), job_writer(path) as writer:
        generate_teacher_data(prompts, [teacher.actor], writer, config=config, on_progress=stop_after_two)
    with job_writer(path) as writer:
        assert len(writer.completed_row_ids()) == sum(committed) < NUM_PROMPTS * NUM_SAMPLES
        resumed = generate_teacher_data(prompts, [teacher.actor], writer, config=config)
    assert (resumed.resumed_rows, resumed.rows) == (sum(committed), NUM_PROMPTS * NUM_SAMPLES - sum(committed))
    with job_writer(path) as writer:
        again = generate_teacher_data(prompts, [teacher.actor], writer, config=config)
    assert (again.rows, again.response_tokens) == (0, 0)
    reader = StoreReader(path)
    assert set(reader.row_ids) == {
        f"q{prompt}:{sample}" for prompt in range(NUM_PROMPTS) for sample in range(NUM_SAMPLES)
    }
    rows = reader.rollouts(range(len(reader)))
    assert any(not np.array_equal(a.response_ids, b.response_ids) for a, b in itertools.pairwise(rows))
    for row in rows:
        prompt = prompts[int(row.row_id.split(":")[0][1:])]
        np.testing.assert_array_equal(row.prompt_ids, prompt.token_ids)
        assert row.sets is not None
        assert row.sets.num_states == len(row.response_ids) + (row.finish_reason == "length")


def test_batch_of_an_engine_that_died_goes_to_the_others(teacher: Teacher, tmp_path: Path) -> None:
    """With one dead engine the job still makes every row; with none left it says so."""
    dead = teacher_actor({**teacher.arguments, "llm": {**teacher.arguments["llm"], "model": str(tmp_path / "none")}})
    with job_writer(tmp_path / "store") as writer:
        stats = generate_teacher_data(job_prompts(), [dead, teacher.actor], writer, config=job_config())
    assert stats.rows == NUM_PROMPTS * NUM_SAMPLES
    with (
        pytest.raises(ClusterError, match="no teacher engine is left"),
        job_writer(tmp_path / "other") as w,
    ):
        generate_teacher_data(job_prompts(), [dead], w, config=job_config())


def test_engine_that_does_not_answer_is_lost(
    teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch that takes longer than cluster.generate_timeout_s loses its engine; the log names the rows."""
    with pytest.raises(ClusterError, match="no teacher engine is left"), job_writer(tmp_path / "store") as writer:
        generate_teacher_data(job_prompts(), [teacher.actor], writer, config=job_config(timeout_s=0.001))
    assert "while generating rows q0:0 to" in caplog.text
    assert "did not answer in time" in caplog.text
