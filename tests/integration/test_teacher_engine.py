"""A real vLLM engine in a real Ray actor: candidate sets against a float64 reference, resume, weights switched.

The models are tiny Qwen2s with random weights, made here. One actor serves the whole module; where a test needs another
engine (a smaller cache, another model), it is restarted inside the actor.
"""

# P prompt tokens, T response tokens, S states, V vocabulary

import itertools
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
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
from openrlhf_bd.teacher.requests import RolloutRequest, ScoringRequest
from openrlhf_bd.teacher.work import Sampling, Scoring

pytestmark = pytest.mark.integration
# Actors cannot import this module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

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
    # The tests read its counters.
    arguments["llm"]["disable_log_stats"] = False
    try:
        yield Teacher(teacher_actor(arguments), arguments)
    finally:
        ray.shutdown()
        shutil.rmtree(ray_folder, ignore_errors=True)


def teacher_actor(
    arguments: dict[str, Any], actor_class: type[TeacherEngine] = TeacherEngine, **environment: str
) -> Any:
    remote_class = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(actor_class)
    env_vars = engine_environment(arguments["llm"]["model"]) | environment
    return remote_class.options(runtime_env={"env_vars": env_vars}).remote(arguments)


def get(ref: Any) -> Any:
    return ray.get(ref, timeout=TIMEOUT_S)


def restart(teacher: Teacher, *, ahead: bool = False, **llm: Any) -> None:
    """Start the actor's engine anew, with changed arguments of vLLM.

    With `ahead` it schedules a step before it has the tokens of the last, as engines on GPUs do; the actor then counts
    the states that it records behind the tokens kept.
    """
    arguments = {**teacher.arguments, "llm": {**teacher.arguments["llm"], **llm}}

    def start_with(engine: Any, arguments: dict[str, Any]) -> None:
        engine.shutdown()
        engine.arguments = arguments
        with scheduling_ahead() if ahead else nullcontext():
            engine._start()
        if ahead:
            engine.num_beyond = 0
            engine._rpc(count_states_beyond, engine)

    get(teacher.actor.__ray_call__.remote(start_with, arguments))


@contextmanager
def scheduling_ahead() -> Iterator[None]:
    """Engines that start in here schedule ahead. vLLM turns it off on CPU, where it gains nothing; it works."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_keep(config: Any) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(check_and_keep)  # type: ignore[assignment]
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = check  # type: ignore[method-assign]


def count_states_beyond(worker: Any, engine: Any) -> None:
    """Let engine.num_beyond count what a worker in this process recorded and nobody asks for."""
    take = worker.take_recorded

    def counting_take(rows: Sequence[int], num_states: Sequence[int]) -> Any:
        worker.state_recorder._work_off()
        engine.num_beyond += sum(len(worker.state_recorder._states[row]) for row in rows) - sum(num_states)
        return take(rows, num_states)

    worker.take_recorded = counting_take


def assert_scheduled_ahead(teacher: Teacher) -> None:
    """The engine did run ahead, and recorded a sample behind a stop token."""

    def read(engine: Any) -> tuple[bool, int]:
        return engine.llm.llm_engine.vllm_config.scheduler_config.async_scheduling, engine.num_beyond

    is_async, num_beyond = get(teacher.actor.__ray_call__.remote(read))
    assert is_async
    assert num_beyond > 0


def counter(teacher: Teacher, name: str) -> int:
    """One of vLLM's counters, since the engine was started."""

    def read(engine: Any) -> int:
        return sum(int(metric.value) for metric in engine.llm.get_metrics() if metric.name == f"vllm:{name}")

    return get(teacher.actor.__ray_call__.remote(read))


def is_recording(worker: Any) -> bool:
    return worker.state_recorder is not None


def record_with(teacher: Teacher, options: RecordOptions) -> None:
    """Let the running engine record something else."""

    def change(worker: Any) -> None:
        worker.state_recorder.options = options

    get(teacher.actor.__ray_call__.remote(lambda engine: engine._rpc(change)))


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


def compare(
    rollouts: Sequence[Rollout], reference: Reference, *, top_p: float = TOP_P, always: Sequence[int] = STOP_IDS
) -> Comparison:
    """Compare every recorded state with the brute force; masses and log-probabilities are asserted on the way."""
    counts = Comparison()
    for rollout in rollouts:
        assert rollout.sets is not None
        assert rollout.logprobs_T is not None
        logprobs_SV = reference.state_logprobs(rollout, rollout.sets.num_states)
        taken_logprobs = logprobs_SV[np.arange(len(rollout.response_ids)), rollout.response_ids]
        np.testing.assert_allclose(rollout.logprobs_T, taken_logprobs, atol=1e-4)
        for state, logprobs_V in enumerate(logprobs_SV):
            _compare_state(rollout.sets, state, logprobs_V, top_p, always, counts)
    return counts


def _compare_state(
    sets: RecordedSets,
    state: int,
    logprobs_V: NDArray[np.float64],
    top_p: float,
    always: Sequence[int],
    counts: Comparison,
) -> None:
    span = slice(sets.offsets[state], sets.offsets[state + 1])
    ids = sets.ids_M[span]
    assert sets.logprobs_M is not None
    np.testing.assert_allclose(sets.logprobs_M[span], logprobs_V[ids], atol=1e-4)
    np.testing.assert_allclose(sets.neg_log_mass_S[state], -np.log(np.exp(logprobs_V[ids]).sum()), atol=1e-4)
    order = np.argsort(-logprobs_V, kind="stable")
    mass = np.cumsum(np.exp(logprobs_V[order]))
    size = int((mass < top_p).sum()) + 1
    gap = logprobs_V[order[size - 1]] - logprobs_V[order[size]]
    if np.abs(mass - top_p).min() < NOISE or gap < NOISE:
        counts.ambiguous += 1
        return
    counts.compared += 1
    missing = [token for token in always if token not in order[:size]]
    missing.sort(key=lambda token: -logprobs_V[token])
    in_order = (np.diff(sets.logprobs_M[span][:size]) <= 0).all()
    same = set(ids[:size].tolist()) == set(order[:size].tolist()) and ids[size:].tolist() == missing
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


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 1.0])
def test_sets_are_exact_at_every_p(teacher: Teacher, models: Models, top_p: float) -> None:
    """From one token a set to the whole vocabulary, with ids always included, sampled and scored: exact."""
    always = (330, 12)
    record_with(teacher, RecordOptions(top_p, always, logprobs=True))
    try:
        sampled = generate(teacher, requests(12, seed=9, max_new_tokens=20))
        scored = get(teacher.actor.score.remote(sampled))
    finally:
        record_with(teacher, teacher.arguments["record"])
    for rows in (sampled, scored):
        if top_p == 1:
            assert all(row.sets is not None and row.sets.is_whole for row in rows)
            assert [row.sets.num_states for row in rows if row.sets is not None] == [
                len(row.response_ids) + (row.finish_reason == "length") for row in rows
            ]
            continue
        counts = compare(rows, Reference(models.teacher), top_p=top_p, always=always)
        assert counts.mismatches == 0
        assert counts.compared > 100


def with_shared_prompts(*, seed: int) -> list[RolloutRequest]:
    """Four samples of a prompt of 66 tokens, two of its first 33, and one of its first 65."""
    prompt = np.random.default_rng(seed).integers(10, V, size=66).astype(np.int32)
    lengths = [66, 66, 66, 66, 33, 33, 65]
    return [RolloutRequest(f"s{i}:0", prompt[:length], 10 * seed + i, 20) for i, length in enumerate(lengths)]


def test_shared_prompts_are_read_from_the_cache_and_scored_without_it(teacher: Teacher, models: Models) -> None:
    """Samples that share cached blocks of a prompt have exact sets; scoring computes every position anew."""
    generate(teacher, with_shared_prompts(seed=10))
    before = counter(teacher, "prefix_cache_hits")
    sampled = generate(teacher, with_shared_prompts(seed=10))
    # The blocks have 32 tokens, of which the last of a prompt is always computed: 2 x 5 + 1 x 2 blocks.
    assert counter(teacher, "prefix_cache_hits") - before == 12 * 32
    before = counter(teacher, "prefix_cache_hits")
    scored = get(teacher.actor.score.remote(sampled))
    assert counter(teacher, "prefix_cache_hits") == before
    for rows in (sampled, scored):
        counts = compare(rows, Reference(models.teacher))
        assert counts.mismatches == 0
        assert counts.compared > 50
    for row, again in zip(sampled, scored, strict=True):
        assert row.sets is not None
        assert again.sets is not None
        assert row.sets.num_states == again.sets.num_states


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
    )
    try:
        # Greedy: on CPU vLLM cannot split the prompt of a request that has a seed of its own.
        sampled = generate(teacher, requests(32, seed=4), temperature=0.0)
        preemptions = counter(teacher, "num_preemptions")
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
    restart(teacher, kv_cache_memory_bytes=9 * BLOCK_BYTES)
    try:
        sampled = generate(teacher, requests(32, seed=5))
        preemptions = counter(teacher, "num_preemptions")
    finally:
        restart(teacher)
    assert preemptions > 0
    counts = compare(sampled, Reference(models.teacher))
    assert counts.mismatches == 0
    assert counts.compared > 300


class InterpretedTeacher(TeacherEngine):
    """A teacher on vLLM's runner for GPUs, whose Triton kernels are interpreted."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        # vLLM uses Triton on CPU only with a CPU backend, and asks the package of its GPU build whether this is a CPU.
        # Interpreted kernels need no backend.
        import importlib.metadata
        from types import SimpleNamespace

        import triton.backends

        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "0+cpu" if name == "vllm" else version(name)  # type: ignore
        triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
        super().__init__(arguments)


def test_engine_that_schedules_ahead_records_the_tokens_it_keeps(teacher: Teacher, models: Models) -> None:
    """A scheduler a step ahead of the tokens: exact sets of the tokens kept, in place, also after preemption."""
    restart(teacher, ahead=True, kv_cache_memory_bytes=9 * BLOCK_BYTES)
    try:
        sampled = generate(teacher, requests(32, seed=8))
        assert_scheduled_ahead(teacher)
        preemptions = counter(teacher, "num_preemptions")
        scored = get(teacher.actor.score.remote(sampled))
    finally:
        restart(teacher)
    assert preemptions > 0
    assert {row.finish_reason for row in sampled} == {"stop", "length"}
    for rows in (sampled, scored):
        counts = compare(rows, Reference(models.teacher))
        assert counts.mismatches == 0
        assert counts.compared > 300


def test_v2_model_runner_records_the_same_sets(teacher: Teacher, models: Models) -> None:
    """vLLM's runner for GPUs: exact sets with split prompts, preemption, cached prefixes and a scheduler ahead."""
    llm = {
        **teacher.arguments["llm"],
        "kv_cache_memory_bytes": 5 * BLOCK_BYTES,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 40,
        # The interpreter lacks a function of the noise in float32.
        "use_fp64_gumbel": True,
    }
    arguments = {**teacher.arguments, "llm": llm}
    actor = teacher_actor(arguments, InterpretedTeacher, TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    v2 = Teacher(actor, arguments)
    restart(v2, ahead=True)
    assert get(actor.__ray_call__.remote(lambda engine: engine.llm.llm_engine.vllm_config.use_v2_model_runner))
    asked = [*requests(6, seed=8, max_new_tokens=16), *with_shared_prompts(seed=8)[4:6]]
    sampled = generate(v2, asked, temperature=0.8)
    assert_scheduled_ahead(v2)
    assert counter(v2, "num_preemptions") > 0
    assert counter(v2, "prefix_cache_hits") > 0
    scored = get(actor.score.remote(sampled))
    ray.kill(actor)
    for rows in (sampled, scored):
        counts = compare(rows, Reference(models.teacher))
        assert counts.mismatches == 0
        assert counts.compared > 50


def test_tensor_parallel_teacher_records_once(teacher: Teacher, models: Models) -> None:
    """Two processes with half of the heads and of the vocabulary each: the first one's sets, sampled and scored."""
    arguments = engine_arguments(
        models.teacher,
        max_model_len=MAX_LEN,
        max_num_seqs=32,
        seed=0,
        tensor_parallel_size=2,
        record=teacher.arguments["record"],
    )
    actor = teacher_actor(arguments)
    parallel = Teacher(actor, arguments)
    assert get(actor.__ray_call__.remote(lambda engine: engine._rpc(is_recording))) == [True, False]
    sampled = generate(parallel, requests(16, seed=11))
    scored = get(actor.score.remote(sampled))
    get(actor.shutdown.remote())
    ray.kill(actor)
    for rows in (sampled, scored):
        counts = compare(rows, Reference(models.teacher))
        assert counts.mismatches == 0
        assert counts.compared > 100


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


def job_work() -> Sampling:
    return Sampling(job_prompts(), job_config())


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
    prompts, work, path = job_prompts(), job_work(), tmp_path / "store"
    config = job_config()
    committed: list[int] = []

    def stop_after_two(num_rows: int, note: str) -> None:
        committed.append(num_rows)
        if len(committed) == 2:
            raise Interruption

    with pytest.raises(Interruption), job_writer(path) as writer:
        generate_teacher_data(work, [teacher.actor], writer, config=config, on_progress=stop_after_two)
    with job_writer(path) as writer:
        assert len(writer.completed_row_ids()) == sum(committed) < NUM_PROMPTS * NUM_SAMPLES
        resumed = generate_teacher_data(work, [teacher.actor], writer, config=config)
    assert (resumed.resumed_rows, resumed.rows) == (sum(committed), NUM_PROMPTS * NUM_SAMPLES - sum(committed))
    with job_writer(path) as writer:
        again = generate_teacher_data(work, [teacher.actor], writer, config=config)
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


def test_scoring_job_resumes_where_it_was_interrupted(teacher: Teacher, models: Models, tmp_path: Path) -> None:
    """Responses that are there: each is scored exactly once over two runs, with exact sets, cut ones too."""
    rng = np.random.default_rng(12)
    rows = [
        Rollout(
            request.row_id,
            request.prompt_ids,
            np.append(rng.integers(10, V, size=rng.integers(1, 20)), STOP_IDS[0]).astype(np.int32),
            "stop",
        )
        for request in requests(NUM_PROMPTS, seed=12)
    ]
    rows[3] = replace(rows[3], response_ids=rows[3].response_ids[:-1], finish_reason="length")
    work, config = Scoring([ScoringRequest(row) for row in rows]), job_config()
    manifest = StoreManifest(
        kind="gold", top_p=TOP_P, always_include=tuple(STOP_IDS), has_logprobs=True, num_prompts=NUM_PROMPTS
    )
    committed: list[int] = []

    def stop_after_one(num_rows: int, note: str) -> None:
        committed.append(num_rows)
        raise Interruption

    with pytest.raises(Interruption), StoreWriter(tmp_path / "store", manifest) as writer:
        generate_teacher_data(work, [teacher.actor], writer, config=config, on_progress=stop_after_one)
    with StoreWriter(tmp_path / "store", manifest) as writer:
        stats = generate_teacher_data(work, [teacher.actor], writer, config=config)
    assert (stats.resumed_rows, stats.rows) == (committed[0], NUM_PROMPTS - committed[0])
    reader = StoreReader(tmp_path / "store")
    found = {row.row_id: row for row in reader.rollouts(range(len(reader)))}
    assert found.keys() == {row.row_id for row in rows}
    for row in rows:
        np.testing.assert_array_equal(found[row.row_id].response_ids, row.response_ids)
    # What float16 rounds in the store is compared where it was recorded.
    counts = compare(get(teacher.actor.score.remote(rows)), Reference(models.teacher))
    assert counts.mismatches == 0
    cut = found[rows[3].row_id].sets
    assert cut is not None
    assert cut.num_states == len(rows[3].response_ids) + 1


def test_batch_of_an_engine_that_died_goes_to_the_others(teacher: Teacher, tmp_path: Path) -> None:
    """With one dead engine the job still makes every row; with none left it says so."""
    dead = teacher_actor({**teacher.arguments, "llm": {**teacher.arguments["llm"], "model": str(tmp_path / "none")}})
    with job_writer(tmp_path / "store") as writer:
        stats = generate_teacher_data(job_work(), [dead, teacher.actor], writer, config=job_config())
    assert stats.rows == NUM_PROMPTS * NUM_SAMPLES
    with (
        pytest.raises(ClusterError, match="no teacher engine is left"),
        job_writer(tmp_path / "other") as w,
    ):
        generate_teacher_data(job_work(), [dead], w, config=job_config())


def test_engine_that_does_not_answer_is_lost(
    teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch that takes longer than cluster.generate_timeout_s loses its engine; the log names the rows."""
    with pytest.raises(ClusterError, match="no teacher engine is left"), job_writer(tmp_path / "store") as writer:
        generate_teacher_data(job_work(), [teacher.actor], writer, config=job_config(timeout_s=0.001))
    assert "while generating rows q0:0 to" in caplog.text
    assert "did not answer in time" in caplog.text
