"""`openrlhf-bd new-model`: what it refuses, and what it says of a tokenizer that transformers reads otherwise."""

from pathlib import Path

import pytest

import openrlhf_bd.demo
from openrlhf_bd.cli.new_model import main

TOKENIZER = str(Path(openrlhf_bd.demo.__file__).parent / "teacher")
SMALL = ["--hidden_size", "16", "--num_layers", "1", "--num_heads", "2", "--num_kv_heads", "1"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--tokenizer", "no_folder"], ["--tokenizer no_folder", "expected a folder"]),
        (["--num_heads", "3"], ["--num_heads 3 does not divide --hidden_size 16"]),
        (["--num_kv_heads", "4"], ["--num_kv_heads 4 does not divide --num_heads 2"]),
        (["--num_layers", "0"], ["--num_layers is 0; expected at least 1"]),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, monkeypatch, capsys, argv, parts):
    """Bad arguments end with status 2 and one message; nothing is written."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "model"
    assert main(["--tokenizer", TOKENIZER, "--output_dir", str(folder), *SMALL, *argv]) == 2
    message = capsys.readouterr().err
    assert [part for part in parts if part not in message] == []
    assert "Traceback" not in message
    assert not folder.exists()


def test_tokenizer_that_stays_as_it_is_needs_no_note(tmp_path, capsys):
    """The demo's tokenizer is read back as it was given, and nothing is said of it."""
    assert main(["--tokenizer", TOKENIZER, "--output_dir", str(tmp_path / "model"), *SMALL]) == 0
    assert "note" not in capsys.readouterr().out
