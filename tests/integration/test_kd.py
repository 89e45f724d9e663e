"""Word-level distillation on the data set's own responses, from the command line: scored rows, and no rows of sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_job import job_flags, run_job, write_inputs
from transformers import AutoTokenizer

from openrlhf_bd.store import StoreReader, verify_store

pytestmark = pytest.mark.integration

KD = {
    "algo__distill__name": "kd",
    "algo__distill__preset": "",
    "algo__distill__responses": "gold",
    "actor__num_gpus_per_node": "1",
    "eval__test_datasets": "",
    "eval__dataset": "",
    "train__max_steps": "2",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def scored(inputs: Path) -> Path:
    """A finished run on gold responses that the teacher scored."""
    run = inputs / "scored"
    done = run_job(*job_flags(inputs, run, **KD))
    assert done.returncode == 0, done.stdout
    assert "teacher scores" in done.stdout
    return run


def training_metrics(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "train/loss" in record]


def test_rows_are_the_references_with_the_teachers_sets(inputs: Path, scored: Path) -> None:
    """Each prompt once, its response the reference's tokens and the end of sequence, with a set for each of them."""
    reader = StoreReader(scored / "teacher_data")
    assert reader.manifest.kind == "gold"
    tokenizer = AutoTokenizer.from_pretrained(inputs / "student")
    records = [json.loads(line) for line in (inputs / "corpus" / "train.jsonl").read_text("utf-8").splitlines()]
    rows = {row.row_id: row for row in reader.rollouts(range(len(reader)))}
    assert sorted(rows) == [f"{prompt:08d}:0" for prompt in range(len(records))]
    for prompt, record in enumerate(records):
        row = rows[f"{prompt:08d}:0"]
        expected = tokenizer(record["output"], add_special_tokens=False).input_ids
        np.testing.assert_array_equal(row.response_ids, [*expected, tokenizer.eos_token_id])
        assert row.sets is not None
        assert row.sets.num_states == len(row.response_ids)
        assert row.sets.logprobs_M is not None
        assert row.logprobs_T is not None
    verify_store(reader.path)


def test_student_learns_from_them(scored: Path) -> None:
    """The steps have the metrics of the sets, and the student is there."""
    metrics = training_metrics(scored)
    assert [record["step"] for record in metrics] == [1, 2]
    assert metrics[0]["train/teacher_mass"] >= 0.95
    assert (scored / "model.safetensors").exists()


def test_store_of_the_other_kind_is_refused(inputs: Path, scored: Path) -> None:
    """kd on the teacher's responses does not take scored references for them: status 2, and nothing is written."""
    flags = job_flags(
        inputs,
        inputs / "other",
        **{**KD, "algo__distill__responses": "teacher", "teacher__store_path": str(scored / "teacher_data")},
    )
    done = run_job(*flags)
    assert done.returncode == 2, done.stdout
    assert "kind: found 'gold', expected 'teacher'" in " ".join(done.stdout.split())
    assert not (inputs / "other").exists()


def test_whole_vocabulary_needs_no_engine(inputs: Path) -> None:
    """kd_support full on gold responses: ranks alone, no teacher's data, selection by the validation loss."""
    run = inputs / "full"
    changes = {**KD, "algo__distill__kd_support": "full", "ckpt__best_metric_key": "loss"}
    changes["eval__dataset"] = str(inputs / "corpus" / "validation.jsonl")
    done = run_job(*job_flags(inputs, run, **changes))
    assert done.returncode == 0, done.stdout
    assert not (run / "teacher_data").exists()
    assert StoreReader(run / "gold_data").manifest.top_p is None
    metrics = training_metrics(run)
    assert [record["step"] for record in metrics] == [1, 2]
    assert all(record["train/forward_kl"] > 0 for record in metrics)
    assert "each student rank also holds the whole teacher" in " ".join(done.stdout.split())
    assert "starting" in done.stdout
    assert "engines" not in done.stdout
