"""Jobs in which the teacher sees another prompt than the student, and jobs of several teachers, on real engines.

The models are tiny Qwen2s with random weights and the demo's tokenizer, made here. One Ray session serves the module.
"""

# S states, V vocabulary

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from openrlhf_bd.cli.flags import resolved_yaml
from openrlhf_bd.config import Config
from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.driver import job, teacher_data
from openrlhf_bd.driver.engines import teacher_engines
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.evaluation.sampling import score_by_teacher
from openrlhf_bd.records import Prompt, Rollout
from openrlhf_bd.store import StoreReader, summary
from openrlhf_bd.store.fingerprints import fingerprint_model_folder
from openrlhf_bd.store.repair import take_out_damaged
from openrlhf_bd.store.shards import prompt_hash
from openrlhf_bd.student.lora import ADAPTER_FOLDER
from tests.integration.tiny_job import job_flags, run_job, write_inputs

pytestmark = pytest.mark.integration

TOP_P = 0.8
TIMEOUT_S = 300.0
# Boundaries closer than this in mass, and logits closer than this at them, are within what float32 decides.
NOISE = 2e-5
RECORDS = [
    {"question": f"What is {i} + {i + 3}?", "solution": f"{i} + {i + 3} = {2 * i + 3}", "domain": domain}
    for i, domain in enumerate(["sums", "words", "other"] * 4)
]
ROOT = str(Path(__file__).parents[2])
CONFIGS = Path(ROOT) / "configs" / "examples"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models that differ in their weights, and the records."""
    folder = tmp_path_factory.mktemp("room")
    for seed, name in enumerate(("student", "sums", "words")):
        save_model(folder / name, seed=seed)
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return folder


def save_model(folder: Path, *, seed: int) -> None:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=640,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=0,
        tie_word_embeddings=True,
        # Wide enough that distributions range from peaked to flat.
        initializer_range=0.3,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TEACHER_FOLDER).save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def _ray_session() -> Iterator[None]:
    # A short path: Ray puts Unix sockets below it, whose names may have 107 bytes.
    ray_folder = tempfile.mkdtemp(prefix="bd-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": ROOT}},
        _temp_dir=ray_folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(ray_folder, ignore_errors=True)


def config_of(room: Path, output_dir: Path, **teacher: Any) -> Config:
    return Config.model_validate(
        {
            "algo": {"distill": {"top_p": TOP_P, "include_eos": False}},
            "actor": {"model_name_or_path": str(room / "student")},
            "teacher": {"max_num_seqs": 16} | teacher,
            "rollout": {"n_samples_per_prompt": 2, "max_new_tokens": 16},
            "data": {
                "prompt_dataset": str(room / "train.jsonl"),
                "input_key": "question",
                "input_template": "Q: {}\nA: ",
                "max_len": 64,
            },
            "ckpt": {"output_dir": str(output_dir)},
        }
    )


def generated_rows(config: Config) -> tuple[StoreReader, list[Rollout]]:
    """The rows of the job's generation stage, in the order of their ids."""
    plan = job.check(config, stages=["generate"])
    job.run(config, resolved_config=resolved_yaml(config), plan=plan, stages=["generate"])
    reader = StoreReader(Path(config.ckpt.output_dir) / "teacher_data")
    return reader, reader.rollouts(range(len(reader)))


def record_of(row: Rollout) -> dict[str, str]:
    return RECORDS[int(row.row_id.split(":")[0])]


class Reference:
    """What a model's recorded sets and log-probabilities must be, by transformers in float64."""

    def __init__(self, model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def logprobs(self, prompt_ids: NDArray[np.int32], row: Rollout) -> NDArray[np.float64]:
        """Log-probabilities [S, V] of the row's states after another prompt."""
        assert row.sets is not None
        tokens = np.concatenate([prompt_ids, row.response_ids]).astype(np.int64)
        logits_1LV = self.model(torch.from_numpy(tokens)[None]).logits
        first = len(prompt_ids) - 1
        return torch.log_softmax(logits_1LV[0, first : first + row.sets.num_states], dim=-1).numpy()

    def agrees(self, prompt_ids: NDArray[np.int32], row: Rollout) -> bool:
        """Whether the response's log-probabilities and all sets are this model's after this prompt."""
        assert row.sets is not None
        assert row.logprobs_T is not None
        logprobs_SV = self.logprobs(prompt_ids, row)
        taken_T = logprobs_SV[np.arange(len(row.response_ids)), row.response_ids]
        if not np.allclose(row.logprobs_T, taken_T, atol=1e-4):
            return False
        spans = zip(row.sets.offsets, row.sets.offsets[1:], logprobs_SV, strict=False)
        return all(_is_top_p_set(row.sets.ids_M[start:end], logprobs_V) for start, end, logprobs_V in spans)


def _is_top_p_set(ids: NDArray[np.int32], logprobs_V: NDArray[np.float64]) -> bool:
    """Also true where noise decides how large the set is."""
    order = np.argsort(-logprobs_V, kind="stable")
    mass = np.cumsum(np.exp(logprobs_V[order]))
    size = int((mass < TOP_P).sum()) + 1
    gap = logprobs_V[order[size - 1]] - logprobs_V[order[size]]
    ambiguous = np.abs(mass - TOP_P).min() < NOISE or gap < NOISE
    return bool(ambiguous) or set(ids.tolist()) == set(order[:size].tolist())


@pytest.fixture(scope="module")
def tokenizer(room: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(room / "student")


def test_rows_are_those_of_the_teacher_s_prompt(room: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Self-distillation with a worked solution: the base model that has seen it teaches the one that has not.

    Sets and log-probabilities are those after the teacher's prompt, and not those after the student's, which the rows
    keep. Scoring the same responses under the same prompts gives the same again.
    """
    config = config_of(
        room,
        tmp_path / "run",
        model_name_or_path=str(room / "student"),
        privileged_key="solution",
        privileged_template="Known: {}.",
        max_len=128,
    )
    reader, rows = generated_rows(config)
    assert len(rows) == 2 * len(RECORDS)
    assert reader.manifest.has_teacher_prompts
    reference = Reference(room / "student", tokenizer)
    seen = {}
    for row in rows:
        record = record_of(row)
        teacher_text = f"Q: {record['question']}\n\nKnown: {record['solution']}.\nA: "
        assert tokenizer.decode(row.prompt_ids) == f"Q: {record['question']}\nA: "
        seen[row.row_id] = np.array(tokenizer(teacher_text).input_ids, np.int32)
        assert row.teacher_prompt_hash == prompt_hash(seen[row.row_id])
        assert reference.agrees(seen[row.row_id], row)
        assert not reference.agrees(row.prompt_ids, row)

    bare = [Rollout(row.row_id, row.prompt_ids, row.response_ids, row.finish_reason) for row in rows]
    record_options = RecordOptions(TOP_P, (), logprobs=True)
    with teacher_engines(config, model=str(room / "student"), record=record_options, num_engines=1) as engines:
        prompts = [Prompt(row.row_id, row.prompt_ids, {}, seen[row.row_id]) for row in bare]
        scored = score_by_teacher(engines.handles[0], bare, prompts, timeout_s=TIMEOUT_S)
    for row, again in zip(rows, scored, strict=True):
        np.testing.assert_array_equal(again.prompt_ids, row.prompt_ids)
        assert again.teacher_prompt_hash == row.teacher_prompt_hash
        np.testing.assert_allclose(again.logprobs_T, row.logprobs_T, atol=1e-4)
        assert reference.agrees(seen[row.row_id], again)


@pytest.fixture(scope="module")
def routed(room: Path) -> Config:
    """Two routes and a teacher for all other records; each teacher's eight rows are a shard."""
    return config_of(
        room,
        room / "routed",
        model_name_or_path=str(room / "student"),
        route_key="domain",
        routes=f"sums={room / 'sums'},words={room / 'words'}",
        rows_per_shard=8,
    )


def test_each_row_is_its_own_teacher_s(room: Path, routed: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every row's sets are those of the model that its record names."""
    reader, rows = generated_rows(routed)
    assert len(rows) == 2 * len(RECORDS)
    assert reader.manifest.teachers == ("default", "sums", "words")
    references = {
        "sums": Reference(room / "sums", tokenizer),
        "words": Reference(room / "words", tokenizer),
        "default": Reference(room / "student", tokenizer),
    }
    for row in rows:
        domain = record_of(row)["domain"]
        assert row.teacher == {"other": "default"}.get(domain, domain)
        agreeing = [name for name, reference in references.items() if reference.agrees(row.prompt_ids, row)]
        assert agreeing == [row.teacher]


def test_repair_starts_the_teacher_of_the_damaged_rows_alone(
    room: Path, routed: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the loss of one teacher's shard the same job makes its rows again, and no other teacher is started."""
    store = room / "routed" / "teacher_data"
    before = StoreReader(store)
    (store / "shard-00001.parquet").unlink()
    assert take_out_damaged(store).num_rows == 8
    started: list[str] = []

    def spy(config: Config, *, model: str, **options: Any) -> Any:
        started.append(model)
        return teacher_engines(config, model=model, **options)

    monkeypatch.setattr(teacher_data, "teacher_engines", spy)
    reader, _ = generated_rows(routed)
    assert started == [str(room / "words")]
    assert reader.complete
    assert reader.row_ids == before.row_ids
    assert summary(reader).rows_by_teacher == {"default": 8, "sums": 8, "words": 8}


def test_adapters_learn_from_their_own_base(tmp_path: Path) -> None:
    """The example's command: a base that has seen the answer teaches itself, with adapters, to do without."""
    write_inputs(tmp_path)
    student, output_dir = tmp_path / "student", tmp_path / "run"
    flags = job_flags(
        tmp_path,
        output_dir,
        teacher__model_name_or_path=str(student),
        teacher__system_prompt="none",
        teacher__privileged_key="output",
        teacher__max_len="256",
        data__apply_chat_template="false",
        data__max_prompt_len="none",
        eval__test_datasets="none",
        ds__lora__rank="4",
        train__max_steps="2",
    )
    done = run_job("--config", str(CONFIGS / "self_distillation.yaml"), *flags)
    assert done.returncode == 0, done.stdout
    manifest = StoreReader(output_dir / "teacher_data").manifest
    assert manifest.fingerprints["teacher"] == fingerprint_model_folder(student)
    assert manifest.has_teacher_prompts
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line).get("train/policy_loss") for line in lines]
    assert [math.isfinite(loss) for loss in losses if loss is not None] == [True, True]
    assert (output_dir / ADAPTER_FOLDER).is_dir()
