from __future__ import annotations

import json
from pathlib import Path

import pytest

from openrlhf_bd.cli.main import main


def write_timeline(folder: Path) -> None:
    spans = [
        ("student ranks", "train", 0.0, 3.0),
        ("teacher engine 0", "score", 3.0, 4.0),
        ("student ranks", "train", 4.0, 5.0),
    ]
    lines = [
        json.dumps({"lane": lane, "activity": activity, "start_s": start_s, "end_s": end_s, "step": 1, "session": 1})
        for lane, activity, start_s, end_s in spans
    ]
    (folder / "timeline.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_shares_are_printed_and_the_trace_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Ranks work 4 of 5 seconds and wait for the teacher in the other one."""
    write_timeline(tmp_path)
    assert main(["timeline", str(tmp_path), "--trace", str(tmp_path / "out" / "trace.json")]) == 0
    printed = capsys.readouterr().out
    assert "training, 5.0 s" in printed
    [ranks] = [line.split() for line in printed.splitlines() if line.startswith("student ranks")]
    assert ranks[2:] == ["80.0", "0.0", "0.0", "20.0", "teacher", "engine", "20", "%"]
    assert json.loads((tmp_path / "out" / "trace.json").read_text(encoding="utf-8"))["traceEvents"]


def test_a_folder_without_a_timeline_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The message says which file was looked for, and what should be there."""
    assert main(["timeline", str(tmp_path)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path}/timeline.jsonl: no spans found; expected the folder of a run" in message
