"""The toy scale's models and data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, OPTForCausalLM, Qwen2ForCausalLM

from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.experiments.toy import ToyModel, make_data, make_model, read_toy_data, read_toy_models

CORPUS = {
    "num_train": 12,
    "num_validation": 4,
    "tasks": ["dates", "logic"],
    "tests": {"dolly": {"num_records": 6}, "vicuna": {"num_records": 3, "tasks": ["dates"]}},
}


@pytest.mark.parametrize(
    ("family", "kind"), [("gpt2", GPT2LMHeadModel), ("opt", OPTForCausalLM), ("qwen2", Qwen2ForCausalLM)]
)
def test_model_has_the_real_class_and_runs(tmp_path: Path, family: str, kind: type) -> None:
    """A toy model loads as its family's own class, with heads that vLLM runs on CPUs and the corpus' vocabulary."""
    folder = make_model(ToyModel(family=family, hidden_size=64, num_layers=1), tmp_path / "model")  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model) is kind
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    assert model.config.eos_token_id == tokenizer.eos_token_id
    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3, len(tokenizer))
    assert logits.isfinite().all()


def test_opt_350m_keeps_its_quirks(tmp_path: Path) -> None:
    """What sets opt-350m apart is there: narrow embeddings that are projected, norms after blocks, none at the end."""
    model = ToyModel(family="opt", hidden_size=64, num_layers=1, embedding_size=32, post_norm=True)
    loaded = AutoModelForCausalLM.from_pretrained(make_model(model, tmp_path / "model"))
    decoder = loaded.model.decoder
    assert decoder.embed_tokens.weight.shape[1] == 32
    assert decoder.project_in.weight.shape == (64, 32)
    assert decoder.project_out.weight.shape == (32, 64)
    assert decoder.final_layer_norm is None
    assert not decoder.layers[0].do_layer_norm_before
    # No token is padding, so every embedding can learn.
    assert decoder.embed_tokens.padding_idx is None


def test_same_description_gives_the_same_model(tmp_path: Path) -> None:
    """A model is a function of its description; one that is there is left as it is; torch's state stays."""
    model = ToyModel(family="gpt2", hidden_size=32, num_layers=1)
    state = torch.get_rng_state()
    first, second = (make_model(model, tmp_path / name) / "model.safetensors" for name in ("a", "b"))
    assert torch.equal(state, torch.get_rng_state())
    assert first.read_bytes() == second.read_bytes()
    changed = first.stat().st_mtime_ns
    make_model(model, tmp_path / "a")
    assert first.stat().st_mtime_ns == changed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_demo_teacher_is_the_shipped_one(tmp_path: Path) -> None:
    """`base: demo_teacher` is the package's trained teacher, weight for weight; max_len alone may differ."""
    model = ToyModel(family="qwen2", base="demo_teacher")
    folder = make_model(model, tmp_path / "teacher")
    assert (folder / "model.safetensors").read_bytes() == (TEACHER_FOLDER / "model.safetensors").read_bytes()
    shipped, longer = (
        json.loads((path / "config.json").read_text("utf-8"))
        for path in (TEACHER_FOLDER, make_model(model.model_copy(update={"max_len": 1024}), tmp_path / "longer"))
    )
    assert json.loads((folder / "config.json").read_text("utf-8")) == shipped
    assert longer == {**shipped, "max_position_embeddings": 1024}


def test_data_has_every_name_and_disjoint_splits(tmp_path: Path) -> None:
    """Every name that experiment files use has a file of the asked size and families; no test record is trained on."""
    paths = make_data(read_toy_data(CORPUS, where="toy.yaml"), tmp_path / "data")
    rows = {name: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for name, path in paths.items()}
    assert {name: len(found) for name, found in rows.items()} == {
        "train": 12,
        "validation": 4,
        "pretrain": 12,
        "pretrain_opt": 12,
        "dolly": 6,
        "vicuna": 3,
    }
    assert {row["family"] for row in rows["train"] + rows["validation"] + rows["dolly"]} == {"dates", "logic"}
    assert {row["family"] for row in rows["vicuna"]} == {"dates"}
    seen = {(row["instruction"], row["input"]) for row in rows["train"]}
    assert not any((row["instruction"], row["input"]) in seen for row in rows["dolly"] + rows["validation"])
    assert all(row["text"] for row in rows["pretrain"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "gpt3"}, "toy.yaml: models.m: family: .*'gpt3'"),
        ({"family": "gpt2", "hidden_size": 48}, "hidden_size 48 is no multiple of head_size 32"),
        ({"family": "gpt2", "post_norm": True}, "belong to family opt"),
        ({"family": "gpt2", "width": 64}, "toy.yaml: models.m: width: .*found 64"),
        ({"family": "opt", "base": "demo_teacher"}, "base demo_teacher is of family qwen2"),
    ],
)
def test_wrong_description_is_refused(values: dict[str, object], message: str) -> None:
    """A wrong description says which model and key, what was found, and what is wrong with it."""
    with pytest.raises(ConfigError, match=message):
        read_toy_models({"m": values}, where="toy.yaml")


def test_unknown_family_of_problems_is_refused() -> None:
    """A test set of families that the corpus does not have names those that it has."""
    tests = {"dolly": {"num_records": 1, "tasks": ["poetry"]}}
    with pytest.raises(ConfigError, match=r"toy.yaml: data: tests.dolly.tasks: .*poetry.*addition"):
        read_toy_data({**CORPUS, "tests": tests}, where="toy.yaml")
