"""Benchmarks through lm-evaluation-harness itself, where it is installed: a local task, the demo's teacher."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from openrlhf_bd.cli.retention import main
from openrlhf_bd.data.templates import format_prompt
from openrlhf_bd.demo.corpus import iter_records
from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.evaluation.retention import Retention

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'openrlhf-bd[retention]'")
pytestmark = pytest.mark.integration

NUM_DOCUMENTS = 24
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_tasks(folder: Path) -> Path:
    """Which of four worked answers belongs to a problem of the demo corpus; and a task whose data is not there."""
    folder.mkdir()
    records = list(islice(iter_records("test", "retention"), NUM_DOCUMENTS))
    with (folder / "demo.jsonl").open("w", encoding="utf-8") as file:
        for number, record in enumerate(records):
            choices = [records[(number + 7 * shift) % NUM_DOCUMENTS]["output"] for shift in range(4)]
            gold = number % 4
            choices[0], choices[gold] = choices[gold], choices[0]
            prompt = format_prompt(record["instruction"], record["input"])
            file.write(json.dumps({"prompt": prompt, "choices": choices, "gold": gold}) + "\n")
    for name, data in (("bd_demo", "demo.jsonl"), ("bd_no_data", "missing.jsonl")):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / data), encoding="utf-8")
    return folder


def test_local_task(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The demo's teacher tells its answers from others', far above chance; a second call measures nothing."""
    tasks, path = write_tasks(tmp_path / "tasks"), tmp_path / "out" / "teacher.retention.json"
    arguments = [str(TEACHER_FOLDER), "--output_dir", str(tmp_path / "out"), "--include_path", str(tasks)]
    assert main([*arguments, "--tasks", "bd_demo", "--limit", "16"]) == 0
    found = Retention.read(path)
    accuracy = found.tasks["bd_demo"]["acc"]
    # One of four by chance; 16 documents have a standard error of at most 1/8 there.
    assert accuracy.value > 0.5
    assert accuracy.stderr is not None
    assert accuracy.stderr > 0
    assert found.settings["bd_demo"].num_documents == 16
    capfd.readouterr()
    written = path.stat().st_mtime_ns
    assert main([*arguments, "--tasks", "bd_demo", "--limit", "16"]) == 0
    assert path.stat().st_mtime_ns == written
    assert "bd_demo" in capfd.readouterr().out


def test_tasks_are_checked_before_the_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A task that is not there, or whose data is not, ends the command before a model is loaded, with its name."""
    tasks = write_tasks(tmp_path / "tasks")
    arguments = [str(TEACHER_FOLDER), "--output_dir", str(tmp_path / "out"), "--include_path", str(tasks)]
    assert main([*arguments, "--tasks", "bd_demo,hellaswagg"]) == 2
    assert "did you mean hellaswag" in capfd.readouterr().err
    assert main([*arguments, "--tasks", "bd_no_data"]) == 2
    assert "task bd_no_data: its data cannot be loaded" in capfd.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "nowhere"), "--tasks", "bd_demo"]) == 2
    assert "expected a folder of YAML files" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
