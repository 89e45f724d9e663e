"""`openrlhf-bd prepare-data` on small local files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openrlhf_bd.cli import prepare_data
from openrlhf_bd.demo.models import TEACHER_FOLDER


def dolly_record(number: int, **changes: str) -> dict[str, str]:
    return {"instruction": f"Say {number}.", "context": "", "response": str(number), "category": "open_qa"} | changes


def write(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepare(folder: Path, dolly: Path, *more: str) -> int:
    small = ["--num_validation", "2", "--num_test", "3", "--max_prompt_len", "80", "--max_len", "100"]
    tokenizer = ["--tokenizer", str(TEACHER_FOLDER)]
    return prepare_data.main(["--output_dir", str(folder), "--dolly", str(dolly), *tokenizer, *small, *more])


@pytest.fixture
def dolly(tmp_path: Path) -> Path:
    """20 usable records, one that comes twice, one whose prompt and one whose response is too long."""
    records = [dolly_record(number) for number in range(20)]
    long_text = " ".join(str(number) for number in range(200))
    records += [dolly_record(3), dolly_record(100, context=long_text), dolly_record(101, response=long_text)]
    return write(tmp_path / "dolly.jsonl", records)


def test_splits_are_disjoint_and_the_same_again(
    tmp_path: Path, dolly: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Usable records are split as asked, none twice; a second run finds the same files; what was left out is said."""
    assert prepare(tmp_path / "data", dolly) == 0
    said = capsys.readouterr().out
    assert "23 records; left out: 2 with more than 80 tokens of prompt or 100 in all, 1 that came before" in said
    parts = {name: read(tmp_path / "data" / f"{name}.jsonl") for name in ("train", "validation", "dolly", "dolly_rest")}
    # 20 usable, of which 2 validate, 3 test, and 3 more are held out.
    assert {name: len(rows) for name, rows in parts.items()} == {
        "train": 12,
        "validation": 2,
        "dolly": 3,
        "dolly_rest": 3,
    }
    instructions = [row["instruction"] for rows in parts.values() for row in rows]
    assert sorted(instructions) == sorted(f"Say {number}." for number in range(20))
    assert set(parts["train"][0]) == {"instruction", "input", "output"}
    assert prepare(tmp_path / "data", dolly) == 0
    assert "train.jsonl: there already, the same 12 records" in capsys.readouterr().out
    assert {name: read(tmp_path / "data" / f"{name}.jsonl") for name in parts} == parts


def test_test_sets_are_checked_and_copied(tmp_path: Path, dolly: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A test set in the right form is copied in the form that the experiments read; what is missing is named."""
    vicuna = write(tmp_path / "v.jsonl", [{"id": "1", "instruction": "Why?", "input": "", "output": "So."}])
    assert prepare(tmp_path / "data", dolly, "--vicuna", str(vicuna)) == 0
    assert read(tmp_path / "data" / "vicuna.jsonl") == [{"instruction": "Why?", "input": "", "output": "So."}]
    said = capsys.readouterr().out
    for name in ("self_inst.jsonl", "pretrain", "pretrain_opt"):
        assert f"{tmp_path / 'data' / name}: still missing" in said
    assert "vicuna.jsonl: still missing" not in said


def test_wrong_test_set_writes_nothing(tmp_path: Path, dolly: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A test record without an answer is named by file and line, and no file is written."""
    vicuna = write(tmp_path / "v.jsonl", [{"instruction": "Why?", "input": ""}])
    assert prepare(tmp_path / "data", dolly, "--vicuna", str(vicuna)) != 0
    assert f'{vicuna}:1: "output" is missing' in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_other_files_are_not_replaced(tmp_path: Path, dolly: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with other records stays as it is, and nothing else is written beside it."""
    mine = write(tmp_path / "train.jsonl", [{"instruction": "mine"}])
    assert prepare(tmp_path, dolly) == 2
    assert read(mine) == [{"instruction": "mine"}]
    assert not (tmp_path / "validation.jsonl").exists()
    assert f"{mine}: is there with other records" in capsys.readouterr().err


def test_too_few_records_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If nothing would be left to train on, the message says how many records there are and how many are held out."""
    few = write(tmp_path / "few.jsonl", [dolly_record(number) for number in range(8)])
    assert prepare(tmp_path / "data", few) != 0
    assert "8 records are left, and 8 are held out" in capsys.readouterr().err
