"""`openrlhf-bd plan --measure`: what it says before a job, beside what the job then takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from openrlhf_bd.cli.flags import parse_config, resolved_yaml
from openrlhf_bd.config import Config
from openrlhf_bd.demo.corpus import write_corpus
from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.driver import job
from openrlhf_bd.driver.measure import measured_plan
from openrlhf_bd.store import StoreReader, summary

pytestmark = pytest.mark.integration

NUM_PROMPTS, NUM_SAMPLED = 96, 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, num_train=NUM_PROMPTS, num_validation=1, num_test=1, seed=3)
    return folder / "train.jsonl"


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    # A short path: Ray puts Unix sockets below it, whose names may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="bd-", dir="/tmp") as folder:
        ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, _temp_dir=folder)
        yield
        ray.shutdown()


def flat_teacher(folder: Path) -> Path:
    """Random weights: nearly the same probability for each of 4,000 tokens, and so sets of some 3,800 ids."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=4000, num_hidden_layers=1, max_position_embeddings=256, **shape))
    model.generation_config = GenerationConfig(eos_token_id=0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TEACHER_FOLDER).save_pretrained(folder)
    return folder


def config_of(teacher: Path, corpus: Path, output_dir: Path) -> Config:
    argv = {
        "teacher.model_name_or_path": teacher,
        "teacher.max_num_seqs": 32,
        "rollout.max_new_tokens": 24,
        "data.prompt_dataset": corpus,
        "data.input_key": "instruction",
        "data.prompt_wrapper": "paper",
        "data.max_len": 160,
        "ckpt.output_dir": output_dir,
    }
    words = [word for name, value in argv.items() for word in (f"--{name}", str(value))]
    return parse_config(words, prog="openrlhf-bd generate", description="")[0]


@pytest.mark.parametrize("kind", ["flat", "peaked"])
def test_the_finished_store_is_as_the_sample_said(kind: str, corpus: Path, tmp_path: Path) -> None:
    """Disk space, tokens and set sizes measured on a quarter of the rows are within 25 % of the whole job's."""
    teacher = flat_teacher(tmp_path / "teacher") if kind == "flat" else TEACHER_FOLDER
    config = config_of(teacher, corpus, tmp_path / "run")
    plan = job.check(config, stages=("generate",))
    measured = measured_plan(config, plan, num_rows=NUM_SAMPLED)
    assert not (tmp_path / "run").exists()
    (found,) = measured.estimates.values()
    job.run(config, resolved_config=resolved_yaml(config), plan=plan, stages=("generate",))
    store = summary(StoreReader(tmp_path / "run" / "teacher_data"))

    assert store.num_rows == found.num_rows == NUM_PROMPTS
    assert found.store_bytes.value == pytest.approx(store.size_bytes, rel=0.25)
    assert found.response_tokens.value == pytest.approx(store.num_response_tokens, rel=0.25)
    assert found.bytes_per_token == pytest.approx(store.bytes_per_token, rel=0.25)
    assert store.sets is not None
    assert found.sample.summary.sets is not None
    assert found.sample.summary.sets.mean_size == pytest.approx(store.sets.mean_size, rel=0.25)
    # The assumption of the plan alone: right for the peaked teacher, far off for the flat one.
    (assumed,) = plan.disk
    assert (store.size_bytes > 50 * assumed.num_bytes) == (kind == "flat")
