"""The report's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from openrlhf_bd.cli.judge import main as judge
from openrlhf_bd.cli.report import main
from tests.judge_server import write_responses_file


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds nothing of a run; expected the folder of a run"),
        (["pipeline.json", "table1.html"], "holds an experiment (table1.html), whose runs are the folders in it"),
        (["run.json", "BD.responses.jsonl"], "holds evaluations of several models (BD.responses.jsonl)"),
    ],
)
def test_folders_that_are_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], message: str):
    """A folder that is no run gets no empty page, and the message says what it is."""
    for name in names:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_page_in_the_place_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A page that is to be written where a folder is ends with one line, and leaves nothing behind."""
    run, place = tmp_path / "run", tmp_path / "place"
    run.mkdir()
    place.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n', encoding="utf-8")
    assert main([str(run), "--output", str(place)]) == 2
    assert f"{place}: is a directory" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [place, run]


def test_a_judge_that_is_to_write_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A file in the place of the judge's folder is named before a question goes out."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    files = []
    for name in ("a", "b"):
        files.append(write_responses_file(tmp_path / f"{name}.responses.jsonl", ["x!", "y"]))
    flags = ["--api_base", "http://127.0.0.1:9/v1", "--output_dir", str(tmp_path / "file")]
    assert judge([*map(str, files), *flags]) == 2
    assert "file is a file; name a folder" in capsys.readouterr().err
