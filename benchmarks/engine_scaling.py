"""The generation job with one engine and with two: tokens/s, the engines' idle share, the driver's own time.

A tiny teacher of random weights on one thread an engine, real actors, the real store. Runs with one and with two
engines take turns, so that other work on the machine falls on both. Idle is the time between an engine's answer and its
next batch: what the driver spends on committing rows while nothing is queued for that engine.

PYTHONPATH=. python3 benchmarks/engine_scaling.py [--rows N] [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from openrlhf_bd.config import Config
from openrlhf_bd.driver.engines import engine_actors
from openrlhf_bd.engines.arguments import RecordOptions, engine_arguments, engine_environment
from openrlhf_bd.records import Prompt, Rollout
from openrlhf_bd.store import StoreManifest, StoreWriter
from openrlhf_bd.teacher.engine import TeacherEngine
from openrlhf_bd.teacher.generate import generate_teacher_data
from openrlhf_bd.teacher.requests import RolloutRequest
from openrlhf_bd.teacher.work import Sampling

VOCABULARY, MAX_LEN, PROMPT_TOKENS = 4096, 96, 24
RECORD = RecordOptions(top_p=0.8, always_include=(0,), logprobs=True)


class TimedTeacher(TeacherEngine):
    """A teacher's engine that remembers when it worked."""

    def generate_rollouts(
        self, requests: Sequence[RolloutRequest], *, temperature: float, top_p: float
    ) -> list[Rollout]:
        started = time.monotonic()
        rows = super().generate_rollouts(requests, temperature=temperature, top_p=top_p)
        self._spans = [*getattr(self, "_spans", []), (started, time.monotonic())]
        return rows

    def take_spans(self) -> list[tuple[float, float]]:
        """Start and end of each call since the last time, monotonic seconds."""
        spans, self._spans = self._spans, []
        return spans


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the job.

    Attributes:
        tokens_per_s: over its wall time.
        idle_share: of the engines, between the first and the last call of each.
        driver_s_per_1000_rows: CPU time of the driver's process.
    """

    tokens_per_s: float
    idle_share: float
    driver_s_per_1000_rows: float


def make_teacher(folder: Path) -> str:
    """A model whose distributions range from peaked to flat."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY, num_hidden_layers=4, max_position_embeddings=128, initializer_range=0.2, **shape
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=0)
    model.save_pretrained(folder)
    return str(folder)


def run_job(engines: Sequence[Any], prompts: Sequence[Prompt], config: Config, folder: Path) -> Run:
    """The whole job on these engines, into a new store."""
    manifest = StoreManifest(
        kind="teacher",
        top_p=RECORD.top_p,
        always_include=RECORD.always_include,
        has_logprobs=True,
        num_prompts=len(prompts),
    )
    started, cpu_started = time.monotonic(), time.process_time()
    with StoreWriter(folder, manifest) as writer:
        stats = generate_teacher_data(Sampling(prompts, config), engines, writer, config=config)
    wall_s, cpu_s = time.monotonic() - started, time.process_time() - cpu_started
    spans = ray.get([engine.take_spans.remote() for engine in engines])
    held = sum(calls[-1][1] - calls[0][0] for calls in spans)
    busy = sum(end - start for calls in spans for start, end in calls)
    return Run(stats.response_tokens / wall_s, 1 - busy / held, 1000 * cpu_s / len(prompts))


def main() -> None:
    """Print both runs and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=32, help="rows that an engine decodes at once")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    prompts = [
        Prompt(f"{i}", random.integers(1, VOCABULARY, PROMPT_TOKENS).astype(np.int32), {}) for i in range(options.rows)
    ]
    config = Config.model_validate(
        {"data": {"max_len": MAX_LEN}, "teacher": {"max_num_seqs": options.max_num_seqs}, "train": {"seed": 1}}
    )
    with tempfile.TemporaryDirectory(prefix="bd-", dir="/tmp") as folder:
        model = make_teacher(Path(folder) / "teacher")
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
        arguments = engine_arguments(
            model, max_model_len=MAX_LEN, max_num_seqs=options.max_num_seqs, seed=1, record=RECORD
        )
        runs: dict[int, list[Run]] = {1: [], 2: []}
        with engine_actors(
            TimedTeacher,
            arguments,
            num_engines=2,
            gpus_per_engine=1,
            environment=engine_environment(model) | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
            timeout_s=300.0,
            what="the teacher's engines",
        ) as engines:
            run_job(engines.handles, prompts[:64], config, Path(folder) / "warm")
            for number in range(options.rounds):
                for num_engines in runs:
                    path = Path(folder) / f"rows-{num_engines}-{number}"
                    runs[num_engines].append(run_job(engines.handles[:num_engines], prompts, config, path))
        ray.shutdown()
    print(f"{options.rows} rows, {options.max_num_seqs} at once, medians of {options.rounds} rounds")
    for num_engines, found in runs.items():
        print(
            f"{num_engines} engine{'s' if num_engines > 1 else ' '}: "
            f"{median(run.tokens_per_s for run in found):7.0f} tokens/s, idle "
            f"{median(run.idle_share for run in found):.1%}, driver "
            f"{median(run.driver_s_per_1000_rows for run in found):.2f} CPU s per 1,000 rows"
        )
    ratios = [two.tokens_per_s / one.tokens_per_s for one, two in zip(runs[1], runs[2], strict=True)]
    print(f"ratio: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
