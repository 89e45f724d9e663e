"""Synthetic run folders for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from openrlhf_bd.config import Config
from openrlhf_bd.evaluation.results import DatasetScores, Evaluation, Sample
from openrlhf_bd.store import StoreManifest, StoreSummary
from openrlhf_bd.store.statistics import SetSummary

PROMPTS = (
    ("Sort, largest first.", "03427", "Work: 7|0342, 4|032, 3|02\n2|0. The answer is 74320."),
    ("Apply the changes one by one.", "8 -6 -2 +4 +5", "8-6=2\n2-2=0; 0+4=4, 4+5=9\nAnswer: 9"),
    ("How many pens are in 8 crates and 1 boxes?", "", "8*2=16 boxes then 16+1=17; 17*4=68 pens\nAnswer: 68"),
)


def make_evaluation(label: str, quality: float, *, num_seeds: int = 5, seed: int = 0) -> Evaluation:
    """Scores and responses around a quality between 0 and 1."""
    rng = random.Random(f"{label}:{seed}")

    def values(mean: float, spread: float) -> list[float]:
        return [mean + rng.gauss(0, spread) for _ in range(num_seeds)]

    scores = DatasetScores(
        num_prompts=200,
        seeds=[10 * (i + 1) for i in range(num_seeds)],
        rouge_l=values(45 + 30 * quality, 0.6),
        accuracy=values(0.1 + 0.7 * quality, 0.015),
        teacher_nll=values(1.9 - 1.6 * quality, 0.02),
        response_tokens=values(42.0, 0.5),
        stop_rate=values(0.97, 0.005),
        distinct_1=values(0.31, 0.01),
        distinct_2=values(0.62, 0.01),
        temperature=1.0,
        top_p=1.0,
    )
    samples = [
        Sample(
            dataset="demo",
            instruction=instruction,
            input=context,
            reference=reference,
            response=reference if rng.random() < quality else reference[: len(reference) // 2] + " The answer is 7.",
            rouge_l=100 * quality,
            correct=rng.random() < quality,
        )
        for instruction, context, reference in PROMPTS
    ]
    return Evaluation(label=label, model=f"ckpt/{label}", datasets={"demo": scores}, samples=samples)


def make_metrics(num_steps: int, quality: float, *, seed: int = 0) -> list[dict[str, Any]]:
    """Metrics of a plausible run."""
    rng = random.Random(seed)
    records: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        decay = math.exp(-4 * step / num_steps)
        noise = rng.gauss(0, 0.04)
        train = {
            "loss": 0.5 + 1.6 * decay - 0.2 * quality + noise,
            "policy_loss": 0.3 + 1.1 * decay + noise / 2,
            "linear_loss": 0.2 + 0.8 * decay + noise / 3,
            "td_loss": 0.02 + 0.05 * decay,
            "tail_loss": 0.08 + 0.2 * decay,
            "ptx_loss": 0.4 + 0.4 * decay + noise / 2,
            "reward": -0.3 - decay + noise,
            "reward_end": 0.2 - decay + noise,
            "value": 1.2 - 2 * decay + noise,
            "logsumexp": 0.4 + 0.5 * decay + noise / 2,
            "logsumexp_spread": 0.7 + 0.4 * decay,
            "out_of_set_rate": 0.04 + rng.gauss(0, 0.004),
            "teacher_mass": 0.985,
            "student_mass": 0.97 - 0.3 * decay,
            "set_size": 2.4 + rng.gauss(0, 0.1),
            "actor_grad_norm": 0.8 + 3 * decay + abs(noise),
            "actor_lr": 5e-4 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / num_steps))),
            "unlisted_metric": noise,
        }
        line = {"step": step, "epoch": step / 50, "time_s": 1.7e9 + step}
        records.append(line | {f"train/{name}": value for name, value in train.items()})
        if step % max(1, num_steps // 6) == 0:
            reached = quality * (1 - decay)
            score = {"eval/rouge_l": 45 + 30 * reached, "eval/accuracy": 0.1 + 0.7 * reached, "eval/stop_rate": 0.97}
            records.append(line | score)
    return records


def make_run(
    folder: Path,
    label: str,
    quality: float,
    *,
    algorithm: str = "bd",
    preset: str = "robust",
    num_steps: int = 300,
    with_evaluation: bool = True,
    with_metrics: bool = True,
) -> Path:
    """A run folder as a job leaves it."""
    folder.mkdir(parents=True)
    config = Config.model_validate(
        {
            "algo": {"distill": {"name": algorithm, "preset": preset}},
            "actor": {"model_name_or_path": "models/student"},
            "teacher": {"model_name_or_path": "models/teacher"},
            "data": {
                "prompt_dataset": "data/train.jsonl",
                "pretrain_dataset": "data/text.jsonl",
                "label_key": "output",
            },
            "logger": {"wandb": {"key": "a-secret-key"}},
        }
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    stages = {
        "rows": {"seconds": 73.2},
        "training": {"seconds": 311.0, "steps": num_steps},
        "evaluation": {"seconds": 58.4},
    }
    record = {"version": "0.1.0", "identity": {}, "stages": stages}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    if with_metrics:
        lines = (json.dumps(record) for record in make_metrics(num_steps, quality))
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if with_evaluation:
        make_evaluation(label, quality).write(folder)
    return folder


def make_store_summary() -> StoreSummary:
    """A summary of 1,000 states."""
    mass = [0.78, 0.9, 0.935, 0.95, 0.958, 0.963, *[0.966 + 0.0005 * k for k in range(44)]]
    return StoreSummary(
        manifest=StoreManifest(
            kind="teacher",
            top_p=0.95,
            has_logprobs=True,
            num_prompts=100,
            versions={"vllm": "0.29.0", "torch": "2.13.0"},
        ),
        complete=True,
        num_rows=100,
        num_prompt_tokens=6200,
        num_response_tokens=41_000,
        size_bytes=1_000_000,
        bytes_per_token=24.4,
        mean_response_length=410.0,
        response_length_quantiles={0.5: 400, 0.9: 480, 0.99: 500, 1.0: 512},
        rows_by_teacher={},
        length_histogram=[(385, 512, {"length": 4, "stop": 96})],
        finish_reasons={"length": 4, "stop": 96},
        online=None,
        num_states=41_004,
        sets=SetSummary(
            num_states=41_004,
            num_candidates=98_000,
            mean_size=2.39,
            size_quantiles={0.5: 1, 0.9: 5, 0.99: 21, 1.0: 64},
            size_histogram=[
                (1, 1, 28_000),
                (2, 2, 7_000),
                (3, 4, 3_500),
                (5, 8, 1_500),
                (9, 16, 700),
                (17, 32, 290),
                (33, 64, 14),
            ],
            one_token_share=0.683,
            mean_mass=0.984,
            incomplete_share=None,
            out_of_set_rate=0.017,
            sorted_mass=mass,
        ),
    )
