"""The evaluation file."""

import json
import math
from pathlib import Path

import pytest

from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.results import DatasetResult, DatasetScores, Evaluation, Sample

SCORES = DatasetScores(
    num_prompts=2, seeds=[10, 20], rouge_l=[50.0, 60.0], response_tokens=[4.0, 5.0], stop_rate=[1.0, 0.5]
)
SAMPLE = Sample(
    dataset="demo", instruction="say “x”", input="", reference=["x", "y"], response="x", rouge_l=100.0, correct=None
)


def test_written_and_read_again_it_is_the_same(tmp_path: Path):
    """evaluation.json holds everything, and leaves no temporary file behind."""
    evaluation = Evaluation.from_results("bd:robust", "ckpt", {"demo": DatasetResult(SCORES, [SAMPLE])})
    evaluation.write(tmp_path)
    assert Evaluation.read(tmp_path) == evaluation
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_keys_of_the_file(tmp_path: Path):
    """Other tools find label, model, datasets by name and samples, as documented."""
    Evaluation.from_results("a", "m", {"demo": DatasetResult(SCORES, [SAMPLE])}).write(tmp_path / "other.json")
    content = json.loads((tmp_path / "other.json").read_text(encoding="utf-8"))
    assert list(content) == ["label", "model", "datasets", "samples"]
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
