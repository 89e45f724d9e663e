"""Fingerprints tell apart what differs, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from openrlhf_bd.errors import DataError
from openrlhf_bd.store.fingerprints import fingerprint_json, fingerprint_model_folder, fingerprint_tokenizer

VOCABULARY = {"<eos>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5}


def tokenizer(
    vocabulary: dict[str, int] = VOCABULARY,
    merges: tuple[tuple[str, str], ...] = (("a", "b"), ("b", "c")),
    **special: str,
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **({"eos_token": "<eos>"} | special))


def test_json_fingerprint_is_of_the_value() -> None:
    """The order of keys does not count, the order of lists and every value do."""
    assert fingerprint_json({"a": 1, "b": [1, 2]}) == fingerprint_json({"b": [1, 2], "a": 1})
    assert fingerprint_json([1, 2]) != fingerprint_json([2, 1])
    assert fingerprint_json(1) != fingerprint_json("1")
    assert len(fingerprint_json(None)) == 32
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint_json(float("nan"))


def test_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    """A tokenizer saved to any folder and loaded again, used with padding, or given a chat template, is the same."""
    original = tokenizer()
    expected = fingerprint_tokenizer(original)
    original.save_pretrained(tmp_path / "here")
    assert fingerprint_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "here")) == expected
    original.pad_token = "<eos>"
    original(["a", "ab"], padding=True, truncation=True, max_length=2)
    original.chat_template = "{{ messages }}"
    assert fingerprint_tokenizer(original) == expected


@pytest.mark.parametrize(
    "other",
    [
        tokenizer(vocabulary=VOCABULARY | {"c": 6}),
        tokenizer(merges=(("b", "c"), ("a", "b"))),
        tokenizer(eos_token="c"),
        tokenizer(bos_token="a"),
    ],
)
def test_tokenizers_that_differ(other: PreTrainedTokenizerFast) -> None:
    """Another id, the order of merges, another end of text or beginning of text change the fingerprint."""
    assert fingerprint_tokenizer(other) != fingerprint_tokenizer(tokenizer())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder, as far as fingerprints look."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4, "_name_or_path": "x"}), encoding="utf-8")
    save_file({"weight": np.arange(4, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def test_model_fingerprint_is_of_the_content(model: Path, tmp_path: Path) -> None:
    """The folder's name, other files in it, and where the model came from don't count; configuration and weights do."""
    expected = fingerprint_model_folder(model)
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").touch()
    (copy / "config.json").write_text(json.dumps({"_name_or_path": "y", "hidden_size": 4}), encoding="utf-8")
    assert fingerprint_model_folder(copy) == expected
    (copy / "config.json").write_text(json.dumps({"hidden_size": 5}), encoding="utf-8")
    assert fingerprint_model_folder(copy) != expected
    save_file({"weight": np.arange(1, 5, dtype=np.float32)}, model / "model.safetensors")
    assert fingerprint_model_folder(model) != expected


def test_hub_models_are_named(tmp_path: Path) -> None:
    """A model on a hub is known by name and revision, without a download."""
    assert fingerprint_model_folder("org/model-1.5B") == "hub:org/model-1.5B@main"
    assert fingerprint_model_folder("org/model-1.5B", revision="abc") == "hub:org/model-1.5B@abc"


def test_model_folders_that_are_none(model: Path, tmp_path: Path) -> None:
    """A missing folder, and one without configuration or safetensors weights, are refused by name."""
    with pytest.raises(DataError, match="found neither"):
        fingerprint_model_folder(tmp_path / "missing")
    (model / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"at least one \*\.safetensors"):
        fingerprint_model_folder(model)
    save_file({"weight": np.zeros(1, np.float32)}, model / "model.safetensors")
    (model / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"config\.json: not JSON"):
        fingerprint_model_folder(model)
