"""The student's weights from real DeepSpeed ranks to real vLLM engines, which sample with them at once.

The models are tiny Qwen2s with random weights. Two ranks and two engines serve the whole module: ranks build another
model, engines load one, in the same processes.
"""

# P prompt tokens, T response tokens, R requests, V vocabulary

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from student_runs import STOP, VOCAB, Material, job, save_model, start
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from openrlhf_bd.engines.actor import Completion
from openrlhf_bd.engines.arguments import UpdateOptions, engine_arguments, engine_environment
from openrlhf_bd.engines.rollout import RolloutEngine
from openrlhf_bd.errors import ClusterError, ConfigError
from openrlhf_bd.rollout.calls import CONTROL, CONTROL_CALLS, control
from openrlhf_bd.rollout.weights import AdapterSync, WeightSync
from openrlhf_bd.student.weights import WeightSource
from openrlhf_bd.upstream import RayActorGroup

pytestmark = pytest.mark.integration

MAX_LEN = 63
TIMEOUT_S = 120.0
CALLS = 3  # of an engine that wait for responses at once
TOLERANCE = 1e-4
ROOT = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class Models:
    """Folders of the students."""

    tied: Path
    untied: Path
    gpt2: Path


@pytest.fixture(scope="module")
def models(material: Material) -> Models:
    def qwen2(tied: bool) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=MAX_LEN + 1,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=STOP,
        )

    return Models(
        tied=save_model(qwen2(tied=True), material.folder / "tied"),
        untied=save_model(qwen2(tied=False), material.folder / "untied"),
        gpt2=save_model(
            GPT2Config(
                vocab_size=VOCAB,
                n_embd=64,
                n_layer=2,
                n_head=2,
                n_positions=MAX_LEN + 1,
                bos_token_id=0,
                eos_token_id=STOP,
            ),
            material.folder / "gpt2-wide",
        ),
    )


def start_engine(model: Path, update: UpdateOptions = UpdateOptions("gloo")) -> Any:  # noqa: B008 (frozen)
    arguments = engine_arguments(str(model), max_model_len=MAX_LEN, max_num_seqs=16, seed=0, update=update)
    environment = {**engine_environment(str(model)), "PYTHONPATH": ROOT}
    remote: Any = ray.remote(num_cpus=1, max_restarts=0, concurrency_groups={CONTROL: CONTROL_CALLS})
    return remote(RolloutEngine).options(max_concurrency=CALLS, runtime_env={"env_vars": environment}).remote(arguments)


@pytest.fixture(scope="module")
def engines(student_cluster: None, models: Models) -> list[Any]:
    # Workers cannot import the tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    handles = [start_engine(models.tied) for _ in range(2)]
    get([handle.ready.remote() for handle in handles])
    return handles


def get(refs: Any) -> Any:
    return ray.get(refs, timeout=TIMEOUT_S)


def host(
    ranks: RayActorGroup, engines: Sequence[Any], model: Path, material: Material, run: str, **sections: Any
) -> None:
    """Let ranks train a model and engines sample from it, all in the processes that they have."""
    start(ranks, job(material, run, model, **sections), material)
    get([engine.load.remote(str(model)) for engine in engines])


def train(ranks: RayActorGroup, steps: Sequence[int]) -> None:
    for step in steps:
        get(ranks.async_run_method("train_step", step))


def make_sync(ranks: RayActorGroup, engines: Sequence[Any], **options: Any) -> WeightSync:
    return WeightSync(ranks, engines, transfer="gloo", **{"in_flight": "wait", "timeout_s": TIMEOUT_S, **options})


def prompts(count: int, *, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, size=rng.integers(3, 20)).tolist() for _ in range(count)]


def generate(engine: Any, asked: Sequence[Sequence[int]], *, max_new_tokens: int = 16, **options: Any) -> Any:
    count = len(asked)
    arguments = {"temperature": 1.0, "top_p": 1.0, **options}
    return engine.generate.remote(
        list(asked), max_new_tokens=[max_new_tokens] * count, seeds=list(range(count)), **arguments
    )


class Snapshot:
    """The student as the ranks hold it, by transformers."""

    def __init__(self, ranks: RayActorGroup, folder: Path) -> None:
        get(ranks.async_run_method("save_hf", str(folder)))
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logprobs(self, prompt: Sequence[int], response: NDArray[np.int32]) -> NDArray[np.float32]:
        """Log-probability of each response token at temperature 1."""
        tokens = torch.tensor([[*prompt, *response.tolist()]])
        logprobs_LV = torch.log_softmax(self._model(tokens).logits[0], dim=-1)
        chosen = logprobs_LV[len(prompt) - 1 : -1].gather(1, tokens[0, len(prompt) :, None])
        return chosen[:, 0].numpy()

    @torch.no_grad()
    def all_logprobs(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Log-probability of each next token at temperature 1."""
        logits = self._model(torch.tensor([list(map(int, tokens))])).logits[0, -1]
        return torch.log_softmax(logits.double(), dim=0).numpy()

    def error(self, asked: Sequence[Sequence[int]], sampled: Sequence[Completion]) -> float:
        """Largest difference between an engine's log-probabilities and the student's, nats."""
        differences = [
            np.abs(self.logprobs(prompt, completion.token_ids) - completion.logprobs_T).max()
            for prompt, completion in zip(asked, sampled, strict=True)
        ]
        return float(max(differences))


@pytest.mark.parametrize(("kind", "zero_stage"), [("gpt2", 2), ("untied", 0), ("untied", 3), ("tied", 0), ("tied", 3)])
def test_engines_sample_with_the_trained_weights(
    kind: str, zero_stage: int, two_ranks: RayActorGroup, engines: list[Any], models: Models, material: Material
) -> None:
    """After steps and a sync each engine's sampled tokens have the student's log-probabilities, and its version."""
    host(two_ranks, engines, getattr(models, kind), material, f"{kind}{zero_stage}", ds={"zero_stage": zero_stage})
    asked = prompts(12)
    before = Snapshot(two_ranks, material.folder / f"{kind}{zero_stage}-before")
    sync = make_sync(two_ranks, engines)
    for version, steps in ((0, []), (2, [1, 2]), (3, [3])):
        train(two_ranks, steps)
        seconds = sync.sync(version)
        assert seconds["sync_bytes"] > 0
        now = Snapshot(two_ranks, material.folder / f"{kind}{zero_stage}-now")
        for sampled in get([generate(engine, asked) for engine in engines]):
            assert now.error(asked, sampled) < TOLERANCE
            assert {(row.first_version, row.last_version) for row in sampled} == {(version, version)}
            if version:
                assert before.error(asked, sampled) > 100 * TOLERANCE


def test_recorded_logprobs_are_those_of_the_sampler(
    two_ranks: RayActorGroup, engines: list[Any], models: Models, material: Material
) -> None:
    """With temperature and nucleus a token's log-probability is that of the distribution it was drawn from."""
    temperature, top_p = 0.6, 0.7
    host(two_ranks, engines[:1], models.untied, material, "sampler", ds={"zero_stage": 0})
    snapshot = Snapshot(two_ranks, material.folder / "sampler-now")
    asked, compared = prompts(20), 0
    for prompt, row in zip(asked, get(generate(engines[0], asked, temperature=temperature, top_p=top_p)), strict=True):
        for place, (token, logprob) in enumerate(zip(row.token_ids, row.logprobs_T, strict=True)):
            found = np.exp(snapshot.all_logprobs([*prompt, *row.token_ids[:place]]) / temperature)
            order = np.argsort(-found)
            mass = np.cumsum(found[order]) / found.sum()
            # The fewest tokens whose mass reaches p; a boundary within rounding could fall either way.
            nucleus = order[: int(np.searchsorted(mass, top_p)) + 1]
            if np.abs(mass - top_p).min() > 1e-5:
                assert logprob == pytest.approx(np.log(found[token] / found[nucleus].sum()), abs=TOLERANCE)
                compared += 1
    assert compared > 100


def test_responses_in_flight(two_ranks: RayActorGroup, engines: list[Any], models: Models, material: Material) -> None:
    """New weights find responses under way: they finish first, go on with the new ones, or begin anew."""
    host(two_ranks, engines[:1], models.tied, material, "in-flight", ds={"zero_stage": 0})
    asked = prompts(300, seed=1)
    snapshots = [Snapshot(two_ranks, material.folder / "in-flight-0")]
    make_sync(two_ranks, engines[:1]).sync(0)
    for version, in_flight in enumerate(("wait", "keep", "abort"), start=1):
        train(two_ranks, [version])
        snapshots.append(Snapshot(two_ranks, material.folder / f"in-flight-{version}"))
        sync = make_sync(two_ranks, engines[:1], in_flight=in_flight)
        # As many callers as the engine takes at once, and more: they must not keep the new weights out.
        under_way = [generate(engines[0], part, max_new_tokens=40) for part in (asked[::2], asked[1::2], asked, asked)]
        wait_until_busy(engines[0])
        metrics = sync.sync(version)
        even, odd, *_ = get(under_way)
        sampled = [row for pair in zip(even, odd, strict=True) for row in pair]
        versions = [(row.first_version, row.last_version) for row in sampled]
        old, new = (version - 1,) * 2, (version,) * 2
        assert {old, new} <= set(versions)
        mixed = versions.count((version - 1, version))
        assert (mixed > 0) == (in_flight == "keep")
        assert (metrics["sync_restarted"] > 0) == (in_flight == "abort")
        assert set(versions) <= {old, new, (version - 1, version)}
        for prompt, row in zip(asked, sampled, strict=True):
            before, after = (
                np.abs(snapshots[number].logprobs(prompt, row.token_ids) - row.logprobs_T) < TOLERANCE
                for number in (version - 1, version)
            )
            num_old = len(before) if before.all() else int(before.argmin())
            assert after[num_old:].all()
            if row.first_version == row.last_version:
                assert num_old == len(before) if row.last_version == version - 1 else after.all()
            else:
                assert 0 < num_old < len(before)


def wait_until_busy(engine: Any) -> None:
    first = get(control(engine.progress).remote()).num_tokens
    deadline = time.monotonic() + TIMEOUT_S
    while get(control(engine.progress).remote()).num_tokens < first + 300:
        assert time.monotonic() < deadline


def test_prefix_cache_holds_nothing_of_old_weights(
    two_ranks: RayActorGroup, engines: list[Any], models: Models, material: Material
) -> None:
    """A prompt that was in the cache before an update is computed anew after it."""
    host(two_ranks, engines[:1], models.untied, material, "cache", ds={"zero_stage": 0})
    sync, (engine, *_) = make_sync(two_ranks, engines[:1]), engines
    asked = [prompts(1, seed=2)[0] * 40]
    asked = [asked[0][:40]]
    num_cached = []
    for version in range(2):
        sync.sync(version)
        snapshot = Snapshot(two_ranks, material.folder / "cache-now")
        for _ in range(2):
            num_cached.append(get(engine.__ray_call__.remote(num_cached_tokens, asked[0])))
            assert snapshot.error(asked, get(generate(engine, asked))) < TOLERANCE
        train(two_ranks, [version + 1])
    assert num_cached == [0, 32, 0, 32]


def num_cached_tokens(engine: Any, prompt: list[int]) -> int:
    params = engine._sampling_params(max_tokens=1, temperature=1.0)
    (sampled,) = engine._run([prompt], [params])
    return int(sampled.output.num_cached_tokens)


def test_progress_is_told_while_an_engine_generates(engines: list[Any]) -> None:
    """An engine answers while it generates, and its counts grow; requests of several callers share its steps."""
    before = get(control(engines[0].progress).remote())
    one, other = (generate(engines[0], prompts(100, seed=seed), max_new_tokens=40) for seed in (3, 4))
    seen = []
    while not ray.wait([one, other], num_returns=2, timeout=0)[0][1:]:
        seen.append(get(control(engines[0].progress).remote()))
    num_tokens = sum(len(row.token_ids) for row in get(one) + get(other))
    after = get(control(engines[0].progress).remote())
    assert max(progress.num_running for progress in seen) > 100
    assert len({progress.num_steps for progress in seen}) > 5
    assert after.num_tokens - before.num_tokens == num_tokens
    assert (after.num_running, after.num_waiting, after.is_paused) == (0, 0, False)


def test_an_engine_on_cpus_does_not_sleep(engines: list[Any], models: Models) -> None:
    """Sleep mode is refused where there is no GPU memory to give back, when asked for and when it is to sleep."""
    with pytest.raises(ConfigError, match="on CPUs there is none to give"):
        engine_arguments(
            str(models.tied), max_model_len=8, max_num_seqs=1, seed=0, update=UpdateOptions("gloo", sleep=True)
        )
    with pytest.raises(ClusterError, match="this engine cannot sleep"):
        get(engines[0].sleep.remote())


def test_failed_update_leaves_an_engine_that_refuses(
    two_ranks: RayActorGroup, engines: list[Any], models: Models, material: Material
) -> None:
    """A weight of a wrong shape ends the update; engines refuse, responses under way fail, and a new group helps."""
    host(two_ranks, engines, models.untied, material, "wrong-shape", ds={"zero_stage": 0})
    sync = make_sync(two_ranks, engines, in_flight="keep")
    sync.sync(0)

    def cut_a_weight(rank: Any) -> None:
        (bucket,) = rank._weight_sender._source._buckets
        place, weight, parameter = next(
            (place, weight, parameter)
            for place, (weight, parameter) in enumerate(bucket)
            if weight.name.endswith("layers.1.mlp.down_proj.weight")
        )
        bucket[place] = (replace(weight, shape=(32, 96)), parameter.data[:32])

    get([actor.__ray_call__.remote(cut_a_weight) for actor in two_ranks._actor_handlers])
    under_way = generate(engines[0], prompts(300, seed=5), max_new_tokens=40)
    wait_until_busy(engines[0])
    with pytest.raises(ClusterError, match=r"engine 0 of 2 did not load weights.*version 1 did not arrive whole"):
        sync.sync(1)
    for ref in (under_way, *(generate(engine, prompts(1)) for engine in engines)):
        with pytest.raises(ClusterError, match="version 1 did not arrive whole"):
            get(ref)
    with pytest.raises(ClusterError, match="a new group"):
        sync.sync(1)
    make_sync(two_ranks, engines).sync(1)
    snapshot = Snapshot(two_ranks, material.folder / "wrong-shape-now")
    for engine in engines:
        assert snapshot.error(prompts(8), get(generate(engine, prompts(8)))) < TOLERANCE


def test_a_hanging_engine_is_named_and_its_successor_joins(
    two_ranks: RayActorGroup, engines: list[Any], models: Models, material: Material
) -> None:
    """With one engine stopped the update says which; the other goes on with what it has; a new one takes the place."""
    host(two_ranks, engines, models.tied, material, "replaced", ds={"zero_stage": 3})
    make_sync(two_ranks, engines).sync(0)
    sync = make_sync(two_ranks, engines, timeout_s=1.0)
    train(two_ranks, [1])
    stopped = get(engines[1].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(stopped, signal.SIGSTOP)
    try:
        with pytest.raises(ClusterError, match="engine 1 of 2 did not stop for new weights within"):
            sync.sync(1)
    finally:
        os.kill(stopped, signal.SIGKILL)
    assert {row.first_version for row in get(generate(engines[0], prompts(4)))} == {0}
    engines[1] = start_engine(models.tied)
    make_sync(two_ranks, engines).sync(1)
    snapshot = Snapshot(two_ranks, material.folder / "replaced-now")
    for engine in engines:
        assert snapshot.error(prompts(8), get(generate(engine, prompts(8)))) < TOLERANCE


def test_ranks_that_die_while_they_send_leave_an_engine_that_refuses(
    two_ranks: RayActorGroup, one_rank: RayActorGroup, engines: list[Any], models: Models, material: Material
) -> None:
    """An engine that got a part of the weights refuses to generate, until other ranks have sent it all."""
    host(one_rank, engines[:1], models.tied, material, "killed", ds={"zero_stage": 0})
    sync = make_sync(one_rank, engines[:1])
    sync.sync(0)

    def die_after_the_first_bucket(rank: Any) -> None:
        source = WeightSource(rank._student.engine, dtype=torch.float32, bucket_bytes=2**14)
        whole = source.buckets

        def buckets() -> Iterator[Any]:
            yield next(whole())
            os.kill(os.getpid(), signal.SIGKILL)

        source.buckets = buckets  # type: ignore[method-assign]
        rank._weight_sender._source = source

    get(one_rank._actor_handlers[0].__ray_call__.remote(die_after_the_first_bucket))
    with pytest.raises(ClusterError, match="rank 0 of 1 died when it was to send weights"):
        sync.sync(1)
    with pytest.raises(ClusterError, match="version 1 did not arrive whole"):
        get(generate(engines[0], prompts(1)))
    start(two_ranks, job(material, "killed-again", models.tied, ds={"zero_stage": 0}), material)
    make_sync(two_ranks, engines[:1]).sync(1)
    snapshot = Snapshot(two_ranks, material.folder / "killed-now")
    assert snapshot.error(prompts(8), get(generate(engines[0], prompts(8)))) < TOLERANCE


def test_running_average_is_sent_instead(
    two_ranks: RayActorGroup, engines: list[Any], models: Models, material: Material
) -> None:
    """With average the engines sample from the average, without it from the student itself, which stays as it was."""
    host(two_ranks, engines[:1], models.untied, material, "average", ds={"zero_stage": 3}, train={"enable_ema": True})
    train(two_ranks, [1, 2])
    # What is saved is the average.
    snapshot = Snapshot(two_ranks, material.folder / "average-now")
    sync = make_sync(two_ranks, engines[:1])
    errors = []
    for average in (False, True, False):
        sync.sync(2, average=average)
        errors.append(snapshot.error(prompts(8), get(generate(engines[0], prompts(8)))))
    assert errors[1] < TOLERANCE
    assert errors[0] == pytest.approx(errors[2], abs=TOLERANCE)
    assert errors[0] > 100 * TOLERANCE


def test_wide_parameters_are_rounded_before_they_travel(
    two_ranks: RayActorGroup, models: Models, material: Material
) -> None:
    """For engines of 16 bits, half of the bytes travel; a tied weight travels once; no bucket is over its limit."""
    start(two_ranks, job(material, "wire", models.tied, ds={"zero_stage": 3}), material)

    def look(rank: Any, dtype: torch.dtype) -> tuple[set[str], int, list[str], list[int]]:
        source = WeightSource(rank._student.engine, dtype=dtype, bucket_bytes=2**15)
        with torch.no_grad():
            sizes = [sum(tensor.nbytes for _, tensor in bucket) for bucket in source.buckets()]
        info = source.wire_info()
        return set(info["dtype_names"]), source.num_bytes, info["names"], sizes

    def look_at(dtype: torch.dtype) -> Any:
        return get([actor.__ray_call__.remote(look, dtype) for actor in two_ranks._actor_handlers])[0]

    wide_types, wide_bytes, names, wide_sizes = look_at(torch.float32)
    half_types, half_bytes, _, half_sizes = look_at(torch.bfloat16)
    assert (wide_types, half_types) == ({"float32"}, {"bfloat16"})
    assert wide_bytes == 2 * half_bytes == sum(wide_sizes) == 2 * sum(half_sizes)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert len(wide_sizes) > 3
    assert max(wide_sizes) <= 2**15


def test_adapters_of_a_lora_student_travel_alone(two_ranks: RayActorGroup, models: Models, material: Material) -> None:
    """Adapters go to engines under their version's name; responses under way keep theirs; old ones are unloaded."""
    folder = material.folder / "adapters"
    lora = {"rank": 4, "alpha": 8}
    config = job(material, "lora", models.untied, ds={"zero_stage": 3, "lora": lora}, actor={"adam": {"lr": 5e-2}})
    start(two_ranks, config, material)
    engine = start_engine(models.untied, UpdateOptions("gloo", lora_rank=4))
    sync = AdapterSync(two_ranks, [engine], folder=folder, in_flight="keep", timeout_s=TIMEOUT_S)
    asked = prompts(300, seed=6)
    before = sampled = None
    for version in range(3):
        metrics = sync.sync(version)
        # Rank 4 of 7 layers of 2 blocks: q 64x64, k and v 64x32, o 64x64, gate and up 64x96, down 96x64; fp32.
        assert metrics["sync_bytes"] == 4 * 4 * 2 * (128 + 2 * 96 + 128 + 3 * 160)
        snapshot = Snapshot(two_ranks, material.folder / "lora-now")
        if sampled is not None:
            # They began with the adapter before, and are under way.
            assert {path.name for path in folder.iterdir()} == {f"student-v{version - 1}", f"student-v{version}"}
            assert get(engine.num_adapters.remote()) == 2
            rows = get(sampled)
            assert {(row.first_version, row.last_version) for row in rows} == {(version - 1, version - 1)}
            assert before.error(asked, rows) < TOLERANCE
        rows = get(generate(engine, prompts(8)))
        assert {(row.first_version, row.last_version) for row in rows} == {(version, version)}
        assert snapshot.error(prompts(8), rows) < TOLERANCE
        assert get(engine.num_adapters.remote()) == 1
        before, sampled = snapshot, generate(engine, asked, max_new_tokens=40)
        wait_until_busy(engine)
        train(two_ranks, [version + 1])
    sync._in_flight = "abort"
    assert sync.sync(3)["sync_restarted"] > 0
    assert (3, 3) in {(row.first_version, row.last_version) for row in get(sampled)}
    ray.kill(engine)
