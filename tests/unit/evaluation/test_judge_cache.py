"""The file of judgements."""

from pathlib import Path

import pytest

from openrlhf_bd.errors import DataError, RunFolderError
from openrlhf_bd.evaluation.judge_cache import JUDGEMENTS_FILE, Judgement, open_judgements


def judgement(key: str, verdict: str | None = "A") -> Judgement:
    return Judgement.model_validate(
        {
            "key": key,
            "model": "judge",
            "test_set": "dolly",
            "prompt_id": "p0",
            "shown_a": "BD",
            "shown_b": "KD",
            "verdict": verdict,
            "answers": ["Tie or not — ü"],
            "prompt_tokens": 10,
            "completion_tokens": 1,
        }
    )


def test_judgements_come_back(tmp_path: Path) -> None:
    """What was appended is there for the next reader; of two with one key the later counts."""
    with open_judgements(tmp_path / "new") as judgements:
        for item in (judgement("x", None), judgement("y"), judgement("x", "B")):
            judgements.append(item)
    with open_judgements(tmp_path / "new") as judgements:
        assert dict(judgements) == {"x": judgement("x", "B"), "y": judgement("y")}
    assert len((tmp_path / "new" / JUDGEMENTS_FILE).read_bytes().splitlines()) == 3


def test_cut_last_line_is_ignored_and_replaced(tmp_path: Path) -> None:
    """What a crash left of a line does not count, and the next line takes its place."""
    with open_judgements(tmp_path) as judgements:
        judgements.append(judgement("x"))
    path = tmp_path / JUDGEMENTS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    with open_judgements(tmp_path) as judgements:
        assert set(judgements) == {"x"}
        judgements.append(judgement("y"))
    with open_judgements(tmp_path) as judgements:
        assert set(judgements) == {"x", "y"}
    assert path.read_bytes().startswith(whole)


def test_damaged_line_is_named(tmp_path: Path) -> None:
    """A whole line that is no judgement is an error with its number, and stays as it is."""
    with open_judgements(tmp_path) as judgements:
        judgements.append(judgement("x"))
    path = tmp_path / JUDGEMENTS_FILE
    content = path.read_bytes() + b'{"key": "y"}\n' + path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{JUDGEMENTS_FILE}:2: damaged"), open_judgements(tmp_path):
        pass
    assert path.read_bytes() == content


def test_one_writer(tmp_path: Path) -> None:
    """Two judges in one folder would pay twice: the second is refused, until the first is done."""
    with open_judgements(tmp_path), pytest.raises(RunFolderError, match="another process"), open_judgements(tmp_path):
        pass
    with open_judgements(tmp_path):
        pass
