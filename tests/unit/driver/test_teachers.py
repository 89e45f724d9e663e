"""Jobs whose teacher sees other prompts, or that have several: what is checked, planned and warned of before a run."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from openrlhf_bd.config import Config
from openrlhf_bd.data.prompts import PromptTable
from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.driver.manifests import fingerprint_prompts
from openrlhf_bd.driver.plan import Plan
from openrlhf_bd.driver.preflight import preflight
from openrlhf_bd.driver.run_folder import run_identity
from openrlhf_bd.errors import BDError, ConfigError, DataError
from openrlhf_bd.records import Prompt

RECORDS = [
    {"question": f"What is {i} + 1?", "solution": f"{i} + 1 = {i + 1}", "answer": str(i + 1), "domain": domain}
    for i, domain in enumerate(["sums", "words", "sums", "art"])
]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    for name in ("student", "sums", "words"):
        torch.manual_seed(len(name))
        config = Qwen2Config(
            vocab_size=640,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=256,
            eos_token_id=0,
        )
        Qwen2ForCausalLM(config).save_pretrained(root / name)
        AutoTokenizer.from_pretrained(TEACHER_FOLDER).save_pretrained(root / name)
    (root / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return root


@pytest.fixture
def room(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three models and records, as the current one."""
    path = shutil.copytree(originals, tmp_path / "room")
    monkeypatch.chdir(path)
    return path


def config_of(evaluation: dict[str, Any] | None = None, **teacher: Any) -> Config:
    return Config.model_validate(
        {
            "actor": {"model_name_or_path": "student"},
            "teacher": {"model_name_or_path": "sums"} | teacher,
            "data": {"prompt_dataset": "train.jsonl", "input_key": "question", "label_key": "answer", "max_len": 100},
            "rollout": {"max_new_tokens": 20},
            "eval": evaluation or {},
            "ckpt": {"output_dir": "runs/new"},
        }
    )


ROUTES = {"route_key": "domain", "routes": "sums=sums,words=words"}


def shown(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(plan)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_plan_of_a_teacher_with_prompts_of_its_own(room: Path) -> None:
    """The prompts carry both forms; the plan counts the tokens that the teacher sees."""
    plan = preflight(config_of(privileged_key="solution"), stages=["generate"])
    table = plan.tables["train"]
    tokenizer = AutoTokenizer.from_pretrained("student")
    assert tokenizer.decode(table.prompts[0].seen_by_teacher) == "What is 0 + 1?\n\n0 + 1 = 1"
    num_seen = sum(len(prompt.seen_by_teacher) for prompt in table.prompts)
    assert f"the teacher sees {num_seen} tokens" in shown(plan)


def test_plan_of_several_teachers(room: Path) -> None:
    """The plan shows what each teacher answers, and warns of one that nobody asks."""
    text = shown(preflight(config_of(model_name_or_path="student", **ROUTES), stages=["generate"]))
    for line in (
        "teacher sums: 2 prompts, sums",
        "teacher words: 1 prompts, words",
        "teacher default: 1 prompts, student",
    ):
        assert line in text
    idle = config_of(route_key="domain", routes="sums=sums,wrods=words")
    assert "warning: no record has a domain for teacher wrods" in shown(preflight(idle, stages=["generate"]))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"privileged_key": "solutoin"}, r'train\.jsonl:1: "solutoin" is missing.*--teacher\.privileged_key solution'),
        ({"input_template": "T"}, r"--teacher\.input_template is 'T'; expected exactly one \{\}"),
        ({"apply_chat_template": True}, r"--teacher\.apply_chat_template: the tokenizer has no chat template"),
        ({"max_len": 300}, r"--teacher\.max_len 300 is more than the 256 positions of sums"),
        ({"max_len": 50}, r"--teacher\.max_len 50 is less than --data\.max_len 100"),
        (ROUTES | {"model_name_or_path": None}, r'train\.jsonl:4: "domain" is \'art\', for which there is no teacher'),
        (ROUTES | {"route_key": "domian"}, r'train\.jsonl:1: "domian" is missing.*--teacher\.route_key domain'),
        (ROUTES | {"routes": "sums=./nowhere"}, r"nowhere: there is no such folder.*--teacher\.routes sums"),
    ],
)
def test_what_is_refused_before_an_actor_starts(room: Path, teacher: dict[str, Any], message: str) -> None:
    """Missing columns by record, templates, lengths, unknown routes and models that are not there."""
    with pytest.raises(BDError, match=message) as refused:
        preflight(config_of(**teacher), stages=["generate"])
    assert refused.value.exit_status == 2


def test_tokenizers_of_all_teachers_must_be_the_student_s(room: Path) -> None:
    """The one teacher with another tokenizer is named."""
    path = room / "words" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="the tokenizers of teacher words and student student differ"):
        preflight(config_of(**ROUTES), stages=["generate"])


def test_teachers_must_stop_at_the_same_tokens(room: Path) -> None:
    """Other stop tokens than the first teacher's are refused: a store lists one set of them."""
    path = room / "words" / "generation_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"eos_token_id": [0, 5]}), encoding="utf-8")
    with pytest.raises(DataError, match=r"words \(--teacher\.routes words\) ends responses by the tokens \[0, 5\]"):
        preflight(config_of(**ROUTES), stages=["generate"])


def test_warnings(room: Path) -> None:
    """A model that teaches itself without knowing more, and teacher's prompts that shorten responses."""
    same = preflight(config_of(model_name_or_path="./student"), stages=["generate"]).warnings
    assert any("same model and see the same prompts" in warning for warning in same)
    knowing = config_of(model_name_or_path="student", privileged_key="solution")
    assert not preflight(knowing, stages=["generate"]).warnings
    long = config_of(privileged_key="solution", privileged_template="x" * 70 + "{}")
    (warning,) = preflight(long, stages=["generate"]).warnings
    assert warning.startswith("4 prompts are so much longer as the teacher sees them")


def test_teacher_that_scores_sees_its_own_prompts(room: Path) -> None:
    """With eval.teacher_nll the test set needs the teacher's column, and room for response and teacher's prompt."""
    evaluation = {"test_datasets": "t=train.jsonl", "teacher_nll": True, "max_new_tokens": 20}
    plan = preflight(config_of(evaluation, privileged_key="solution"), stages=["evaluate"])
    assert plan.tables["test:t"].has_teacher_prompts
    long = config_of(evaluation, privileged_key="solution", privileged_template="9" * 70 + "{}")
    with pytest.raises(ConfigError, match=r"--eval\.teacher_nll: prompt 00000000 of test set t has \d+ tokens as"):
        preflight(long, stages=["evaluate"])
    others = config_of(evaluation | {"teacher_nll": False}, privileged_key="solution")
    assert not preflight(others, stages=["evaluate"]).tables["test:t"].has_teacher_prompts


def test_prompt_options_of_the_teacher_belong_to_the_run() -> None:
    """Resuming with another length for the teacher is another run; other engines are not."""
    assert run_identity(config_of())["teacher.max_len"] is None
    assert not {"teacher.max_num_seqs", "teacher.num_engines"} & run_identity(config_of()).keys()


def test_fingerprints_of_prompts() -> None:
    """What the teacher sees has a fingerprint of its own, and a prompt's teacher is part of the prompts'."""

    def table_of(**changes: Any) -> PromptTable:
        prompt = dataclasses.replace(Prompt("0", np.array([1, 2], np.int32), {}), **changes)
        return PromptTable([prompt], 1, 0, 0, 9, 0, 0, 9)

    def print_of(table: PromptTable, *, of_teacher: bool = False) -> str:
        return fingerprint_prompts(table, references=None, of_teacher=of_teacher)

    plain, other = table_of(), table_of(teacher_ids=np.array([3], np.int32))
    assert print_of(plain) == print_of(other)
    assert print_of(plain, of_teacher=True) == print_of(plain)
    assert print_of(other, of_teacher=True) != print_of(plain)
    assert len({print_of(table_of(teacher=name)) for name in ("a", "b", None)}) == 3
