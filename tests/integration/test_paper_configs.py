"""The paper's experiments for real, at toy width: every kind of stage takes a step in each family's own classes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from tiny_job import run_job

from openrlhf_bd.experiments.record import experiment_view, read_record
from openrlhf_bd.store import StoreReader

# Some twenty stages.
PIPELINE_TIMEOUT_S = 1200.0
pytestmark = [pytest.mark.integration, pytest.mark.timeout(PIPELINE_TIMEOUT_S + 60)]

PAPER = Path(__file__).parents[2] / "configs" / "paper"
# One student of each family, OPT's with projected embeddings and post-norms; between them every kind of stage. Online
# methods also go through the student's engines and the transfer of its weights, one in each family.
TRAINED = {
    "GPT2LMHeadModel": ("gpt2-teacher", "gpt2-120m-start", "gpt2-120m-kd", "gpt2-120m-gkd"),
    "OPTForCausalLM": ("opt-teacher", "opt-350m-start", "opt-350m-bd", "opt-350m-minillm"),
    "Qwen2ForCausalLM": (
        *("qwen2.5-teacher", "qwen2.5-0.5b-start", "qwen2.5-0.5b-sft", "qwen2.5-0.5b-seqkd", "qwen2.5-0.5b-bd-robust"),
        *("qwen2.5-0.5b-bd-p0.5", "qwen2.5-0.5b-bd-p1.0", "qwen2.5-0.5b-bd-plain", "qwen2.5-0.5b-rkl"),
    ),
}
TOP_P_OF_ROWS = {"opt-rows": 0.95, "qwen2.5-rows": 0.95, "qwen2.5-whole-rows": 1.0, "figure1-rows": 0.999}
ONE_STEP = {
    "train.max_steps": "1",
    "train.batch_size": "4",
    "data.max_samples": "6",
    "rollout.max_new_tokens": "8",
    # Validation would start an engine for each stage.
    "eval.dataset": "none",
}
# The two pieces that no table of the paper has.
EXTRA = """
title: every kind of stage
include: [{included}]
stages:
  gpt2-120m-gkd:
    extends: [{paper}/pieces/gpt2_120m.yaml, {paper}/pieces/gkd.yaml]
    options:
      actor.model_name_or_path: ${{stages.gpt2-120m-start}}
      teacher.model_name_or_path: ${{stages.gpt2-teacher}}
  qwen2.5-0.5b-rkl:
    extends: [{paper}/pieces/qwen2.5_0.5b.yaml, {paper}/pieces/rkl.yaml]
    options:
      actor.model_name_or_path: ${{stages.qwen2.5-0.5b-start}}
      teacher.model_name_or_path: ${{stages.qwen2.5-teacher}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of one pipeline over the stages of all experiments."""
    folder = tmp_path_factory.mktemp("paper")
    names = ("table1", "table2", "table4", "figure1")
    text = EXTRA.format(paper=PAPER, included=", ".join(str(PAPER / f"{name}.yaml") for name in names))
    (folder / "every.yaml").write_text(text, encoding="utf-8")
    shutil.copytree(PAPER / "scales", folder / "scales")
    asked = [*TOP_P_OF_ROWS, *(stage for stages in TRAINED.values() for stage in stages)]
    arguments = ["--scale", "toy", "--output_dir", str(folder / "runs"), "--only", ",".join(asked)]
    flags = [word for name, value in ONE_STEP.items() for word in (f"--{name}", value)]
    done = run_job(
        str(folder / "every.yaml"), *arguments, *flags, module="openrlhf_bd.cli.pipeline", timeout_s=PIPELINE_TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return folder / "runs"


def stage_folder(runs: Path, stage: str) -> Path:
    stages = experiment_view(read_record(runs), "every", runs)["stages"]
    found = next(item for item in stages if item["name"] == stage)
    assert found["state"] == "finished", found
    return Path(found["folder"])


@pytest.mark.parametrize(("architecture", "stages"), TRAINED.items(), ids=TRAINED)
def test_every_kind_of_training_takes_a_step(finished: Path, architecture: str, stages: tuple[str, ...]) -> None:
    """Each kind of training stage leaves a student of the real class after one step with a finite loss and gradient."""
    for stage in stages:
        folder = stage_folder(finished, stage)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == [architecture], stage
        assert (folder / "model.safetensors").is_file(), stage
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        trained = [step for step in steps if "train/loss" in step]
        assert [step["step"] for step in trained] == [1], stage
        assert math.isfinite(trained[0]["train/loss"]), stage
        assert trained[0]["train/actor_grad_norm"] > 0, stage


def test_opt_350m_is_trained_with_its_quirks(finished: Path) -> None:
    """The student of OPT 350M still projects its embeddings and has norms after the blocks, as vLLM sampled from it."""
    config = json.loads((stage_folder(finished, "opt-350m-minillm") / "config.json").read_text(encoding="utf-8"))
    assert config["word_embed_proj_dim"] < config["hidden_size"]
    assert config["do_layer_norm_before"] is False


@pytest.mark.parametrize(("stage", "top_p"), TOP_P_OF_ROWS.items(), ids=TOP_P_OF_ROWS)
def test_rows_hold_what_is_cut_from_them(finished: Path, stage: str, top_p: float) -> None:
    """The common rows are of p 0.95 with log-probabilities and stop tokens; p = 1 and Fig. 1 have rows of their own."""
    manifest = StoreReader(stage_folder(finished, stage) / "teacher_data").manifest
    assert manifest.top_p == top_p
    assert manifest.has_logprobs == (top_p < 1)
    assert bool(manifest.always_include) == (top_p == 0.95)
