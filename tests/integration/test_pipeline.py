"""An experiment file from the command line: real stages, stopped and gone on with, reused and changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_job import JOB_TIMEOUT_S, job_environment, run_job, write_inputs

from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.evaluation.results import Evaluation
from openrlhf_bd.store import StoreReader

pytestmark = pytest.mark.integration

MAIN = "openrlhf_bd.cli.main"
EXPERIMENT = """
title: Tiny
stages:
  sft:
    label: SFT
    group: Tiny
    extends: common.yaml
    options: {algo.distill: {name: sft, pretrain_coef: 0}, actor.model_name_or_path: "${models.student}"}
  rows:
    kind: generate
    extends: common.yaml
    options: {teacher.model_name_or_path: "${models.teacher}"}
  bd:
    label: BD
    group: Tiny
    extends: common.yaml
    options:
      algo.distill.pretrain_coef: 0
      teacher: {model_name_or_path: "${models.teacher}", store_path: "${stages.rows}/teacher_data"}
      actor.model_name_or_path: ${stages.sft}
  evaluation:
    kind: evaluate
    group: Tiny
    extends: common.yaml
    models: {SFT: "${stages.sft}", BD: "${stages.bd}"}
"""
COMMON = """
data: {prompt_dataset: "${data.train}", input_key: instruction, context_key: input, label_key: output,
       prompt_wrapper: paper, max_len: 160}
rollout: {n_samples_per_prompt: 2, max_new_tokens: 32}
teacher.rows_per_shard: 8
train: {batch_size: 12, max_steps: 2, dynamic_batch_enable: true, max_tokens_per_gpu: 1024}
actor.num_gpus_per_node: 1
ds.param_dtype: fp32
eval: {test_datasets: "test=${data.test}", seeds: [10], test_top_p: [1.0], max_new_tokens: 16}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment file with all that it names."""
    root = tmp_path_factory.mktemp("pipeline")
    write_inputs(root)
    (root / "tiny.yaml").write_text(EXPERIMENT, encoding="utf-8")
    (root / "common.yaml").write_text(COMMON, encoding="utf-8")
    (root / "scales").mkdir()
    (root / "scales" / "full.yaml").write_text(
        f"models: {{student: {root}/student, teacher: {TEACHER_FOLDER}}}\n"
        "data: {train: train.jsonl, test: test.jsonl}\n",
        encoding="utf-8",
    )
    return root


def arguments(folder: Path, *more: str, out: str = "out") -> list[str]:
    return ["pipeline", f"{folder}/tiny.yaml", "--output_dir", f"{folder}/{out}", "--data", f"{folder}/corpus", *more]


def states(folder: Path) -> dict[str, str]:
    """State of each stage that was begun, by the stage's name."""
    path = folder / "out" / "pipeline.json"
    stages: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.exists() else {}
    return {name.rpartition("-")[0]: stage["state"] for name, stage in stages.items()}


def stage_folder(folder: Path, name: str) -> Path:
    (found,) = (folder / "out").glob(f"{name}-*")
    return found


def stop_in_stage(folder: Path, stage: str, number: int) -> tuple[int, str]:
    """Run until a stage is at work, then send its process a signal. Returns exit status and output."""
    command = [sys.executable, "-m", MAIN, *arguments(folder)]
    with subprocess.Popen(
        command, env=job_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while states(folder).get(stage) != "running" and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert states(folder).get(stage) == "running", job.communicate()[0] if job.poll() is not None else stage
        os.kill(job.pid, number)
        output, _ = job.communicate(timeout=JOB_TIMEOUT_S)
        return job.returncode, output


def test_an_experiment_is_stopped_gone_on_with_and_reused(folder: Path) -> None:
    """Ctrl-C in one stage, a kill in a later one, then the whole: finished stages are never run again."""
    status, output = stop_in_stage(folder, "rows", signal.SIGINT)
    assert status == 75, output
    assert "interrupted in stage rows" in output
    assert states(folder) == {"sft": "finished", "rows": "interrupted"}
    weights = (stage_folder(folder, "sft") / "model.safetensors").stat().st_mtime_ns

    status, output = stop_in_stage(folder, "bd", signal.SIGKILL)
    assert status == -signal.SIGKILL, output
    assert "reused stage sft" in output
    assert states(folder) == {"sft": "finished", "rows": "finished", "bd": "running"}

    done = run_job(*arguments(folder), module=MAIN)
    assert done.returncode == 0, done.stdout
    assert set(states(folder).values()) == {"finished"}
    assert "1/2 bd (train)" in done.stdout
    assert (stage_folder(folder, "sft") / "model.safetensors").stat().st_mtime_ns == weights
    assert len(StoreReader(stage_folder(folder, "rows") / "teacher_data")) == 24 * 2
    assert (stage_folder(folder, "bd") / "gold_data").exists() is False
    for label in ("SFT", "BD"):
        assert Evaluation.read(stage_folder(folder, "evaluation") / f"{label}.json").datasets["test"].num_prompts == 6
    assert "Tiny: Rouge-L" in done.stdout
    assert "<html" in (folder / "out" / "tiny.html").read_text(encoding="utf-8")

    again = run_job(*arguments(folder), module=MAIN)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("reused stage") == 4
    assert "starting" not in again.stdout


def test_a_changed_option_runs_what_follows_from_it(folder: Path) -> None:
    """Another option of BD gives a BD and an evaluation beside the old ones; the scores of SFT are taken over."""
    old = {path.name for path in (folder / "out").glob("*-*")}
    text = (folder / "tiny.yaml").read_text(encoding="utf-8")
    coefficient = "      algo.distill.pretrain_coef: 0\n"
    assert text.count(coefficient) == 1
    changed = text.replace(coefficient, f"{coefficient}      actor.adam.lr: 2.0e-4\n")
    (folder / "tiny.yaml").write_text(changed, encoding="utf-8")
    dry = run_job(*arguments(folder, "--dry_run"), module=MAIN)
    assert dry.returncode == 0, dry.stdout
    assert {path.name for path in (folder / "out").glob("*-*")} == old

    done = run_job(*arguments(folder), module=MAIN)
    assert done.returncode == 0, done.stdout
    new = {path.name for path in (folder / "out").glob("*-*")} - old
    assert {name.rpartition("-")[0] for name in new} == {"bd", "evaluation"}
    assert "reused evaluation of SFT" in done.stdout
    assert "evaluate BD:" in done.stdout
    assert "evaluate SFT:" not in done.stdout


def test_a_stage_alone_wants_its_inputs(folder: Path) -> None:
    """`--only` of a stage whose inputs are missing ends at once, with what to run."""
    refused = run_job(*arguments(folder, "--only", "bd", out="other"), module=MAIN)
    assert refused.returncode == 2, refused.stdout
    assert "bd needs rows, sft, which are not finished; run --only rows,sft,bd" in refused.stdout
