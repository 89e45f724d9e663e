"""The evaluation file."""

import json
import math
from pathlib import Path

import pytest

from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.evaluation.results import (
    DatasetResult,
    DatasetScores,
    Evaluation,
    Exposure,
    Sample,
    SavedResponse,
    labelled_paths,
    read_responses,
    responses_path,
    write_responses,
)

SCORES = DatasetScores(
    num_prompts=2, seeds=[10, 20], rouge_l=[50.0, 60.0], response_tokens=[4.0, 5.0], stop_rate=[1.0, 0.5]
)
SAMPLE = Sample(
    dataset="demo", instruction="say “x”", input="", reference=["x", "y"], response="x", rouge_l=100.0, correct=None
)
RESPONSE = SavedResponse(
    test_set="demo",
    prompt_id="00000001",
    seed=10,
    top_p=0.8,
    instruction="say “x”",
    input="line\u2028separator",
    references=["x", "y"],
    response="x\ny",
    num_tokens=3,
    finish_reason="stop",
    rouge_l=66.7,
    correct=None,
)


def test_written_and_read_again_it_is_the_same(tmp_path: Path):
    """evaluation.json holds everything, and leaves no temporary file behind."""
    evaluation = Evaluation.from_results("bd:robust", "ckpt", {"demo": DatasetResult(SCORES, [SAMPLE], [RESPONSE])})
    evaluation.write(tmp_path)
    assert Evaluation.read(tmp_path) == evaluation
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_keys_of_the_file(tmp_path: Path):
    """Other tools find label, model, datasets by name and samples, as documented."""
    Evaluation.from_results("a", "m", {"demo": DatasetResult(SCORES, [SAMPLE], [RESPONSE])}).write(
        tmp_path / "other.json"
    )
    content = json.loads((tmp_path / "other.json").read_text(encoding="utf-8"))
    assert list(content) == ["label", "model", "datasets", "samples", "fingerprint"]
    assert content["datasets"]["demo"]["rouge_l"] == [50.0, 60.0]
    assert content["datasets"]["demo"]["accuracy"] is None
    assert content["samples"][0]["reference"] == ["x", "y"]


def test_infinite_scores_survive(tmp_path: Path):
    """A score that is infinite or NaN is read back as such."""
    scores = SCORES.model_copy(update={"teacher_nll": [math.inf, math.nan]})
    Evaluation(label="a", model="m", datasets={"demo": scores}).write(tmp_path)
    found = Evaluation.read(tmp_path).datasets["demo"].teacher_nll
    assert found is not None
    assert found[0] == math.inf
    assert math.isnan(found[1])


def test_a_missing_value_for_a_seed_is_refused():
    """Every score has one value a seed, or is absent altogether."""
    with pytest.raises(ValueError, match="accuracy has 1 values, expected one for each of 2 seeds"):
        DatasetScores.model_validate({**SCORES.model_dump(), "accuracy": [0.5]})


@pytest.mark.parametrize("content", ["", "{", '{"label": "a"}', '{"label": 1, "model": "m", "datasets": {}}', "[]"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str):
    """A damaged or foreign file is a DataError that names the file."""
    (tmp_path / "evaluation.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"evaluation\.json"):
        Evaluation.read(tmp_path)
    with pytest.raises(DataError, match="not found"):
        Evaluation.read(tmp_path / "elsewhere")


def test_every_response_is_a_line(tmp_path: Path):
    """Responses stand beside their evaluation, one JSON object a line whatever breaks their text has."""
    two = [RESPONSE, RESPONSE.model_copy(update={"seed": 20, "rouge_l": None, "references": []})]
    write_responses(tmp_path, two)
    write_responses(tmp_path / "bd.json", two[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bd.responses.jsonl", "responses.jsonl"]
    assert read_responses(tmp_path) == read_responses(tmp_path / "evaluation.json") == two
    assert read_responses(tmp_path / "bd.json") == read_responses(tmp_path / "bd.responses.jsonl") == two[:1]
    first = json.loads((tmp_path / "responses.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert (first["test_set"], first["seed"], first["top_p"], first["references"]) == ("demo", 10, 0.8, ["x", "y"])


def test_a_damaged_response_is_named(tmp_path: Path):
    """A cut line is an error with its number; no file at all says what writes it."""
    write_responses(tmp_path, [RESPONSE, RESPONSE])
    path = responses_path(tmp_path)
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(DataError, match=r"responses\.jsonl:2: .*Evaluate the model again"):
        read_responses(tmp_path)
    with pytest.raises(DataError, match="not found"):
        read_responses(tmp_path / "elsewhere.json")


def test_labels_name_files(tmp_path: Path):
    """A label's file has only harmless characters, and two labels never share one."""
    found = labelled_paths(tmp_path, ["bd:robust", "SFT, T = 0.7", "../x"])
    assert [path.relative_to(tmp_path).as_posix() for path in found.values()] == [
        "bd-robust.json",
        "SFT-T-0.7.json",
        "x.json",
    ]
    with pytest.raises(ConfigError, match=r"'bd:x' and 'BD x' would both have the file BD-x\.json"):
        labelled_paths(tmp_path, ["bd:x", "BD x"])


def test_measures_have_one_value_a_seed():
    """Exposure has one value a seed, and curves of one length."""
    values = {name: [1.0, 2.0] for name in Exposure.model_fields if name != "top_p"} | {"positions": [1, 2]}
    exposure = Exposure.model_validate({**values, "top_p": 0.8})
    scores = DatasetScores.model_validate({**SCORES.model_dump(), "exposure": exposure.model_dump()})
    assert scores.exposure == exposure
    with pytest.raises(ValueError, match=r"exposure\.reverse_kl has 1 values, expected one for each of 2 seeds"):
        DatasetScores.model_validate({**SCORES.model_dump(), "exposure": {**values, "top_p": 0.8, "reverse_kl": [1.0]}})
    with pytest.raises(ValueError, match="excess_error_T has another length than the 2 positions"):
        Exposure.model_validate({**values, "top_p": 0.8, "excess_error_T": [0.0]})
