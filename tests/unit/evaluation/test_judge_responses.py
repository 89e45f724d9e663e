"""Which responses a judge compares."""

from pathlib import Path

import pytest

from openrlhf_bd.config import JudgeOptions
from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.judge_responses import choose_responses, find_responses, label_of, match_responses
from openrlhf_bd.evaluation.results import Evaluation
from tests.judge_server import saved_response, write_responses_file

OPTIONS = JudgeOptions()


def test_folders_and_files(tmp_path: Path) -> None:
    """A run folder has its responses.jsonl, another folder its only file of responses, a file is itself."""
    run = write_responses_file(tmp_path / "run" / "responses.jsonl", ["x"])
    write_responses_file(tmp_path / "run" / "old.responses.jsonl", ["x"])
    only = write_responses_file(tmp_path / "evaluation" / "BD.responses.jsonl", ["x"])
    assert find_responses(tmp_path / "run") == run
    assert find_responses(tmp_path / "evaluation") == only
    assert find_responses(only) == only


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    """No path, no file and several files are three messages."""
    with pytest.raises(DataError, match="not found"):
        find_responses(tmp_path / "nowhere")
    with pytest.raises(DataError, match="openrlhf-bd evaluate"):
        find_responses(tmp_path)
    for label in ("BD", "KD"):
        write_responses_file(tmp_path / f"{label}.responses.jsonl", ["x"])
    with pytest.raises(DataError, match=r"BD\.responses\.jsonl, KD\.responses\.jsonl"):
        find_responses(tmp_path)


def test_labels(tmp_path: Path) -> None:
    """A method is called what its file or its evaluation says, else by its folder."""
    assert label_of(tmp_path / "BD.responses.jsonl") == "BD"
    assert label_of(tmp_path / "run7" / "responses.jsonl") == "run7"
    Evaluation(label="bd:robust", model="m", datasets={}).write(tmp_path)
    assert label_of(tmp_path / "responses.jsonl") == "bd:robust"


def test_one_test_set_seed_and_nucleus(tmp_path: Path) -> None:
    """Other test sets, seeds and nuclei in the file are left out."""
    rows = [
        saved_response("p0", "mine"),
        saved_response("p0", "other seed", seed=20),
        saved_response("p0", "other nucleus", top_p=0.8),
        saved_response("p0", "other set", test_set="vicuna"),
    ]
    path = write_responses_file(tmp_path / "responses.jsonl", rows)
    assert [row.response for row in choose_responses(path, OPTIONS).values()] == ["mine"]
    with pytest.raises(
        DataError, match=r"no response of self_inst, seed 10, top-p 1; it has dolly, seed 10, top-p 0\.8"
    ):
        choose_responses(path, JudgeOptions(test_set="self_inst"))


def test_two_responses_to_one_prompt_are_refused(tmp_path: Path) -> None:
    """Which of two responses is meant is not guessed."""
    path = write_responses_file(tmp_path / "responses.jsonl", [saved_response("p0", "x"), saved_response("p0", "y")])
    with pytest.raises(DataError, match="two responses to prompt 'p0'"):
        choose_responses(path, OPTIONS)


def test_prompts_are_matched_by_id() -> None:
    """Order does not matter; what only one has is counted for each."""
    a = {name: saved_response(name, f"a {name}") for name in ("p0", "p1", "p2")}
    b = {name: saved_response(name, f"b {name}") for name in ("p2", "p1", "p7", "p8")}
    found = match_responses("BD", "KD", {"BD": a, "KD": b})
    assert [(one.response, other.response) for one, other in found.prompts] == [("a p1", "b p1"), ("a p2", "b p2")]
    assert (found.only_a, found.only_b) == (1, 2)


def test_different_prompts_are_refused() -> None:
    """An id that names two instructions, and files without a common prompt, are no comparison."""
    a, b = saved_response("p0", "x"), saved_response("p0", "y", instruction="something else")
    with pytest.raises(DataError, match="different prompts: prompt 'p0'"):
        match_responses("BD", "KD", {"BD": {"p0": a}, "KD": {"p0": b}})
    with pytest.raises(DataError, match="share no prompt: BD has 1, such as 'p0', KD has 1, such as 'q0'"):
        match_responses("BD", "KD", {"BD": {"p0": a}, "KD": {"q0": saved_response("q0", "y")}})
