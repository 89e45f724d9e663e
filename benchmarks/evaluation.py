"""Tokens/s of an evaluation: through its vLLM engines, by `transformers` generate one by one, and in its best batch.

The same model in float32, the same prompts and the same lengths of responses at temperature 1, on the same cores, one
after another. Two models: the demo's teacher, whose responses end by themselves, and a Qwen2 of 0.1 billion parameters
with random weights, whose prompts and responses are as long as those of databricks-dolly-15k (`_lengths.py`): most are
short, a few are not. Only a response's own tokens count. `generate` gets prompts sorted by length, so that little of a
batch is padding, as many threads as it is fastest with, and stops a batch when its last response has ended.

taskset -c 2,3 env PYTHONPATH=. python3 benchmarks/evaluation.py [--quick] [--batches 8 32 ...]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
from _lengths import dolly_lengths
from _measure import describe_machine
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from openrlhf_bd.data.templates import format_prompt
from openrlhf_bd.demo.corpus import generate_split
from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.driver.engines import EngineActors, engine_actors
from openrlhf_bd.engines.actor import GenerationEngine
from openrlhf_bd.engines.arguments import engine_arguments, engine_environment
from openrlhf_bd.evaluation.sampling import Request, request_seed, sample_responses

VOCABULARY, PAD = 65_536, 0
DEMO_MAX_NEW = 96
TIMEOUT_S = 3600.0
# Tokens by which the number of threads is chosen.
PROBE_TOKENS = 6


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its requests, and the token that ends a response; None: each has the length of its request."""

    name: str
    folder: str
    requests: list[Request]
    eos: int | None

    @property
    def max_len(self) -> int:
        """The longest prompt and response together, tokens."""
        return max(len(request.prompt_ids) + request.max_new_tokens for request in self.requests)


def random_case(folder: Path, num_requests: int) -> Case:
    """A Qwen2 of 0.1 billion parameters that never ends a response by itself."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=512,
            num_hidden_layers=16,
            num_attention_heads=8,
            num_key_value_heads=2,
            intermediate_size=2048,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    random = np.random.default_rng(0)
    requests = [
        Request(random.integers(1, VOCABULARY, int(prompt)).tolist(), int(response), request_seed(10, f"{i}"))
        for i, (prompt, response) in enumerate(zip(*dolly_lengths(num_requests, 0), strict=True))
    ]
    name = f"Qwen2 {sum(parameter.numel() for parameter in model.parameters()) / 1e9:.2f}B, random weights"
    return Case(name, str(folder), requests, None)


def demo_case(num_requests: int) -> Case:
    """The demo's teacher on its own test problems."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER_FOLDER)
    records = generate_split("test", num_requests, seed=0)
    texts = [format_prompt(record["instruction"], record["input"]) for record in records]
    requests = [
        Request(ids, DEMO_MAX_NEW, request_seed(10, f"{i}")) for i, ids in enumerate(tokenizer(texts).input_ids)
    ]
    return Case("demo teacher, 0.002B", str(TEACHER_FOLDER), requests, int(tokenizer.eos_token_id))


class Lengths(StoppingCriteria):
    """Ends each response at the length of its request."""

    def __init__(self, prompt_length: int, limits: Sequence[int]) -> None:
        self._last = torch.tensor(limits) + prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self._last


def generate(model: PreTrainedModel, batch: Sequence[Request], eos: int | None, *, most: int | None = None) -> int:
    """Sample responses by `transformers`, each of at most `most` tokens; returns how many tokens they have."""
    longest = max(len(request.prompt_ids) for request in batch)
    ids = torch.full((len(batch), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, longest - len(request.prompt_ids) :] = 1
    limits = [min(request.max_new_tokens, most or request.max_new_tokens) for request in batch]
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(limits),
            eos_token_id=eos,
            pad_token_id=PAD if eos is None else eos,
            stopping_criteria=StoppingCriteriaList([Lengths(longest, limits)]),
        )
    if eos is None:
        return sum(limits)
    ended = (out[:, longest:] == eos).int()
    lengths = torch.where(ended.any(dim=1), ended.argmax(dim=1) + 1, out.shape[1] - longest)
    return int(lengths.sum())


def use_best_threads(model: PreTrainedModel, batch: Sequence[Request], eos: int | None) -> int:
    """As many threads as a few tokens of this batch are fastest with: small products gain nothing from many."""
    seconds = {}
    for threads in (1, len(os.sched_getaffinity(0))):
        torch.set_num_threads(threads)
        generate(model, batch, eos, most=2)
        started = time.perf_counter()
        generate(model, batch, eos, most=PROBE_TOKENS)
        seconds[threads] = time.perf_counter() - started
    best = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(best)
    return best


def time_generate(model: PreTrainedModel, case: Case, batch_size: int, num_batches: int) -> tuple[float, int]:
    """Tokens/s of `generate` over batches of evenly spread requests, in order of the prompts' lengths; its threads."""
    count = min(len(case.requests), batch_size * num_batches)
    chosen = [case.requests[i * len(case.requests) // count] for i in range(count)]
    chosen.sort(key=lambda request: len(request.prompt_ids))
    threads = use_best_threads(model, chosen[:batch_size], case.eos)
    started, tokens = time.perf_counter(), 0
    for start in range(0, count, batch_size):
        tokens += generate(model, chosen[start : start + batch_size], case.eos)
    return tokens / (time.perf_counter() - started), threads


def engines_of(case: Case, num_engines: int) -> AbstractContextManager[EngineActors]:
    """The evaluation's engines, which share the cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // num_engines)
    arguments = engine_arguments(
        case.folder,
        max_model_len=case.max_len,
        max_num_seqs=256,
        seed=0,
        enable_prefix_caching=False,
        device="cpu",
    )
    return engine_actors(
        GenerationEngine,
        arguments,
        num_engines=num_engines,
        gpus_per_engine=1,
        environment=engine_environment(case.folder, num_threads=threads, device="cpu")
        | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        timeout_s=600.0,
        what="the engines",
    )


def time_engines(engines: EngineActors, requests: Sequence[Request]) -> tuple[float, int]:
    """Tokens/s of the engines over all requests, and the tokens."""
    started = time.perf_counter()
    found = sample_responses(engines.handles, requests, temperature=1.0, top_p=1.0, timeout_s=TIMEOUT_S)
    tokens = sum(len(completion.token_ids) for completion in found)
    return tokens / (time.perf_counter() - started), tokens


def measure(case: Case, options: argparse.Namespace) -> None:
    """Print the rates of one model."""
    print(f"{case.name}: {len(case.requests)} requests", flush=True)
    with engines_of(case, options.engines) as engines:
        time_engines(engines, case.requests[:16])
        rates, tokens = [], 0
        for _ in range(options.rounds):
            rate, tokens = time_engines(engines, case.requests)
            rates.append(rate)
    ours = median(rates)
    print(
        f"  vLLM, {options.engines} engines: {ours:8.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f}), responses of "
        f"{tokens / len(case.requests):.1f} tokens",
        flush=True,
    )
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    found = {}
    for size in (1, *options.batches):
        found[size], threads = time_generate(
            model, case, size, max(1, (options.rows if size > 1 else options.singles) // size)
        )
        print(
            f"  generate, batch {size:3d}, {threads} threads: {found[size]:8.1f} tokens/s; vLLM is "
            f"{ours / found[size]:.1f} times as fast",
            flush=True,
        )
    best = max(rate for size, rate in found.items() if size > 1)
    print(f"  vLLM against batch 1: {ours / found[1]:.1f} (wanted 5); its best batch: {ours / best:.1f} (wanted 2)")


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="of generate")
    parser.add_argument("--rows", type=int, default=128, help="requests that generate answers at each batch size")
    parser.add_argument("--singles", type=int, default=16, help="requests that generate answers one by one")
    parser.add_argument("--rounds", type=int, default=3, help="of vLLM")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=["demo", "random"], default=["demo", "random"])
    parser.add_argument("--quick", action="store_true", help="the demo's teacher alone, fewer requests")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.rounds, options.rows = 256, 1, 128
    print(f"{describe_machine(torch.device('cpu'))}, {len(os.sched_getaffinity(0))} of the cores", flush=True)
    # Ray's workers would otherwise give way to all other processes.
    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"}
    ray.init(address="local", num_cpus=4, num_gpus=options.engines, include_dashboard=False, log_to_driver=False)
    try:
        if "demo" in options.models:
            measure(demo_case(options.requests), options)
        if "random" in options.models and not options.quick:
            with tempfile.TemporaryDirectory(prefix="bd-", dir="/tmp") as folder:
                measure(random_case(Path(folder), options.requests), options)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
