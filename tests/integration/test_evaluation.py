"""Evaluation through real Ray actors: the shipped demo model in real vLLM engines, and the dispatch over any actors."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.data.templates import format_prompt
from openrlhf_bd.demo.corpus import generate_split, is_correct
from openrlhf_bd.engines.actor import GenerationEngine
from openrlhf_bd.engines.arguments import RecordOptions, engine_arguments, engine_environment
from openrlhf_bd.errors import ClusterError, ConfigError, DataError
from openrlhf_bd.evaluation.evaluate import evaluate_model, evaluate_test_sets, num_units, validate
from openrlhf_bd.evaluation.results import Evaluation
from openrlhf_bd.evaluation.sampling import make_requests, run_batches, sample_responses
from openrlhf_bd.evaluation.scored import TestData, decode_responses
from openrlhf_bd.records import Prompt
from openrlhf_bd.teacher.engine import TeacherEngine

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "openrlhf_bd" / "demo" / "teacher")
MAX_LEN = 256
NUM_PROMPTS = 24
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Engines:
    """Actors with the demo model: one that samples, one that scores."""

    student: Any
    teacher: Any


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    # A short path: Ray puts Unix sockets below it, whose names may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="bd-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        _temp_dir=folder,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def engines(cluster: None) -> Engines:
    def start(actor_class: type, record: RecordOptions | None) -> Any:
        arguments = engine_arguments(MODEL, max_model_len=MAX_LEN, max_num_seqs=64, seed=0, record=record)
        remote = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(actor_class)
        return remote.options(runtime_env={"env_vars": engine_environment(MODEL)}).remote(arguments)

    found = Engines(start(GenerationEngine, None), start(TeacherEngine, RecordOptions(None)))
    ray.get([found.student.ready.remote(), found.teacher.ready.remote()], timeout=START_TIMEOUT_S)
    return found


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    records = generate_split("test", NUM_PROMPTS, seed=0)
    texts = [format_prompt(record["instruction"], record["input"]) for record in records]
    return [
        Prompt(f"test:{i}", np.array(ids, dtype=np.int32), record)
        for i, (ids, record) in enumerate(zip(tokenizer(texts).input_ids, records, strict=True))
    ]


def config_with(**evaluation: Any) -> Config:
    return Config.model_validate(
        {
            "data": {"max_len": MAX_LEN, "input_key": "instruction", "context_key": "input", "label_key": "output"},
            "eval": {"num_examples": 3, **evaluation},
            "cluster": {"generate_timeout_s": 300.0},
        }
    )


def test_the_demo_teacher_is_evaluated(
    engines: Engines, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], tmp_path: Path
):
    """Every prompt is answered once a seed; scores, samples and progress come out, and fit into evaluation.json."""
    config = config_with(seeds=[10, 20])
    progress: list[int] = []
    result = evaluate_model(
        [engines.student],
        prompts,
        dataset_name="demo",
        config=config,
        tokenizer=tokenizer,
        checker=is_correct,
        teacher=engines.teacher,
        on_progress=progress.append,
    )
    scores = result.scores
    assert scores.num_prompts == NUM_PROMPTS
    assert scores.seeds == [10, 20]
    assert scores.accuracy is not None
    # Far above guessing: these answers have many digits or letters.
    assert min(scores.accuracy) > 0.15
    assert scores.rouge_l is not None
    assert all(0 < value <= 100 for value in scores.rouge_l)
    assert min(scores.stop_rate) > 0.8
    # Its own samples are likely to a peaked teacher, but not certain.
    assert scores.teacher_nll is not None
    assert all(0.001 < value < 1.5 for value in scores.teacher_nll)
    assert scores.teacher_nll[0] != scores.teacher_nll[1]
    assert sum(progress) == num_units(NUM_PROMPTS, config=config, teacher=True)
    assert [sample.instruction for sample in result.samples] == [prompts[i].record["instruction"] for i in (0, 8, 16)]
    assert all(sample.response == sample.response.strip() for sample in result.samples)
    evaluation = Evaluation.from_results("teacher", MODEL, {"demo": result})
    evaluation.write(tmp_path)
    assert Evaluation.read(tmp_path) == evaluation


def test_validation_is_the_first_seed_of_the_evaluation(
    engines: Engines, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
):
    """Greedy, so that both sample the same: validate gives what evaluate_model gives for one seed."""
    config = config_with(seeds=[10], temperature=0.0)
    quick = validate([engines.student], prompts, config=config, tokenizer=tokenizer, checker=is_correct)
    whole = evaluate_model(
        [engines.student], prompts, dataset_name="demo", config=config, tokenizer=tokenizer, checker=is_correct
    ).scores
    assert whole.accuracy == [quick["accuracy"]]
    assert whole.rouge_l == [quick["rouge_l"]]
    assert whole.stop_rate == [quick["stop_rate"]]
    assert whole.response_tokens == [quick["response_tokens"]]
    assert whole.teacher_nll is None


def test_test_sets_sampled_together_get_the_responses_that_each_gets_alone(
    engines: Engines, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
):
    """What a prompt is answered does not depend on the test sets, nuclei and seeds that are sampled beside it."""
    config = config_with(seeds=[10, 20], max_new_tokens=24)
    parts = {"one": prompts[:15], "other": prompts[15:]}
    tests = {name: TestData(part, config) for name, part in parts.items()}
    progress: list[int] = []
    together = evaluate_test_sets(
        [engines.student],
        tests,
        top_ps=[1.0, 0.8],
        config=config,
        tokenizer=tokenizer,
        on_progress=progress.append,
    )
    assert list(together) == ["one", "other", "one, top-p 0.8", "other, top-p 0.8"]
    assert sum(progress) == num_units(NUM_PROMPTS, config=config, teacher=False, top_ps=[1.0, 0.8])
    same = []
    for name, part in parts.items():
        alone = evaluate_model(
            [engines.student], part, dataset_name=name, config=config, tokenizer=tokenizer, top_p=0.8
        )
        pairs = zip(alone.responses, together[f"{name}, top-p 0.8"].responses, strict=True)
        same += [one.response == other.response for one, other in pairs]
    # All but those where the last bits of batched arithmetic let another token be drawn.
    assert sum(same) >= 0.9 * len(same) == 0.9 * 48
    # Each nucleus draws its own responses.
    both = zip(together["one"].responses, together["one, top-p 0.8"].responses, strict=True)
    assert any(one.response != other.response for one, other in both)


def test_teacher_nll_agrees_with_transformers(
    engines: Engines, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
):
    """The teacher's likelihood of greedy samples is transformers' in float64, per token and over the whole set."""
    config = config_with(seeds=[10], temperature=0.0, max_new_tokens=24)
    found = evaluate_model(
        [engines.student],
        prompts,
        dataset_name="demo",
        config=config,
        tokenizer=tokenizer,
        teacher=engines.teacher,
    ).scores.teacher_nll
    requests = make_requests(prompts, seed=10, max_new_tokens=24, max_len=MAX_LEN)
    completions = sample_responses([engines.student], requests, temperature=0.0, top_p=1.0, timeout_s=300.0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64)
    total, num_tokens = 0.0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int64))
        first = len(prompt.token_ids)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
        total -= float(logprobs[first - 1 : -1].gather(1, ids[first:, None]).sum())
        num_tokens += len(completion.token_ids)
    assert found == [pytest.approx(total / num_tokens, rel=1e-3)]


def test_special_tokens_are_not_part_of_the_text(
    engines: Engines, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
):
    """The stop token counts as a token, and not as text."""
    requests = make_requests(prompts[:4], seed=10, max_new_tokens=None, max_len=MAX_LEN)
    completions = sample_responses([engines.student], requests, temperature=0.0, top_p=1.0, timeout_s=300.0)
    responses = decode_responses(completions, tokenizer)
    assert all(response.finish_reason == "stop" for response in responses)
    for completion, response in zip(completions, responses, strict=True):
        assert response.num_tokens == len(completion.token_ids)
        assert tokenizer.eos_token not in response.text
        assert completion.token_ids[-1] == tokenizer.eos_token_id


def test_what_cannot_be_scored_is_refused(engines: Engines, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]):
    """Without references and checker, or without prompts, nothing is sampled."""
    config = Config.model_validate({"data": {"max_len": MAX_LEN}})
    with pytest.raises(ConfigError, match=r"neither --data\.label_key"):
        validate([engines.student], prompts, config=config, tokenizer=tokenizer)
    with pytest.raises(DataError, match="no prompt"):
        validate([engines.student], [], config=config_with(), tokenizer=tokenizer)


def worker_class() -> type:
    """A class defined in here travels to the actor by value; the actor need not find this module."""

    class Worker:
        """Doubles numbers; at a negative one it does what the number says."""

        def __init__(self) -> None:
            self.num_batches = 0

        def double(self, items: Sequence[int]) -> list[int]:
            self.num_batches += 1
            if -1 in items:
                raise DataError("item -1 was found")
            if -2 in items:
                time.sleep(600)
            if -3 in items:
                raise ZeroDivisionError
            time.sleep(0.02 * len(items))
            return [2 * item for item in items]

        def count(self) -> int:
            return self.num_batches

    return Worker


@pytest.fixture
def workers(cluster: None) -> Iterator[list[Any]]:
    # Without CPUs of their own: beside the engines none may be free.
    actors = [ray.remote(num_cpus=0, max_restarts=0)(worker_class()).remote() for _ in range(3)]
    yield actors
    for actor in actors:
        ray.kill(actor)


def submit(actor: Any, items: Sequence[int]) -> Any:
    return actor.double.remote(list(items))


def test_an_actor_may_have_its_next_batch_waiting(workers: list[Any]):
    """With two batches at a time results keep their order, each item is done once, and no actor idles."""
    items = list(range(50))
    found = run_batches(workers, items, submit, timeout_s=60.0, what="numbers", batch_size=4, at_once=2)
    assert found == [2 * item for item in items]
    counts = ray.get([worker.count.remote() for worker in workers])
    assert sum(counts) == 13
    assert min(counts) >= 2


def test_results_keep_their_order_and_every_actor_works(workers: list[Any]):
    """Batches finish in any order; results come in the items' order, each item is done once, no actor idles."""
    progress: list[int] = []
    items = list(range(50))
    found = run_batches(
        workers, items, submit, timeout_s=60.0, what="numbers", on_progress=progress.append, batch_size=4
    )
    assert found == [2 * item for item in items]
    assert sum(progress) == 50
    counts = ray.get([worker.count.remote() for worker in workers])
    assert sum(counts) == 13
    assert min(counts) >= 1


def test_few_items_are_spread_over_the_actors(workers: list[Any]):
    """A set smaller than a batch is shared by all actors, and an empty one asks none."""
    assert run_batches(workers, [1, 2, 3], submit, timeout_s=60.0, what="numbers") == [2, 4, 6]
    assert ray.get([worker.count.remote() for worker in workers]) == [1, 1, 1]
    assert run_batches(workers, [], submit, timeout_s=60.0, what="numbers") == []


def test_a_stuck_actor_ends_in_a_timeout(workers: list[Any]):
    """An actor that does not answer is an error with the limit's option, in time, and not a hang."""
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"waiting for numbers.*--cluster\.generate_timeout_s"):
        run_batches(workers[:1], [-2], submit, timeout_s=1.0, what="numbers")
    assert time.monotonic() - started < 30


def test_a_dead_actor_is_a_cluster_error(workers: list[Any]):
    """An actor that dies is an error with exit status 75: the same command resumes."""
    ray.kill(workers[0])
    with pytest.raises(ClusterError, match="an actor died while waiting for numbers") as caught:
        run_batches(workers[:1], [1], submit, timeout_s=60.0, what="numbers")
    assert caught.value.exit_status == 75


def test_an_actors_own_error_comes_through(workers: list[Any]):
    """What an actor says on purpose arrives as that error, not as one of Ray's; a bug keeps its own type."""
    with pytest.raises(DataError, match=r"^item -1 was found$"):
        run_batches(workers, [1, -1, 2], submit, timeout_s=60.0, what="numbers")
    with pytest.raises(ZeroDivisionError):
        run_batches(workers, [-3], submit, timeout_s=60.0, what="numbers")
