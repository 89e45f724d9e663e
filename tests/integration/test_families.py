"""Students of every family go through training and validation: DeepSpeed trains what vLLM then samples from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_job import job_flags, run_job, write_inputs

from openrlhf_bd.cli import new_model
from openrlhf_bd.demo.models import TEACHER_FOLDER

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3", "llama"])
def test_family_is_trained_and_validated(inputs: Path, family: str) -> None:
    """A student of the family learns from the teacher's rows, packed, which the next reuses; vLLM samples from it."""
    student = inputs / f"{family}_init"
    shape = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 2, "num_layers": 2, "max_len": 256}
    options = {"tokenizer": TEACHER_FOLDER, "output_dir": student, "model_type": family, **shape}
    assert new_model.main([word for name, value in options.items() for word in (f"--{name}", str(value))]) == 0
    flags = job_flags(
        inputs,
        inputs / family,
        actor__model_name_or_path=str(student),
        teacher__store_path=str(inputs / "store"),
        train__max_steps="2",
        ds__packing_samples="true",
        eval__test_datasets="",
    )
    done = run_job(*flags)
    assert done.returncode == 0, done.stdout
    records = [json.loads(line) for line in (inputs / family / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2]
    assert any("eval/rouge_l" in record for record in records)
    assert (inputs / family / "model.safetensors").is_file()
