"""Reading run folders."""

import math
from pathlib import Path

import pytest

from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.results import write_responses
from openrlhf_bd.evaluation.run_data import RunData, parse_metrics, with_distinct_labels
from openrlhf_bd.evaluation.statistics import paired_difference
from tests.unit.evaluation.experiments import make_scored
from tests.unit.evaluation.runs import make_run


def test_a_whole_run_folder(tmp_path: Path):
    """Options, curves, scores and wall time are read from the folder of a job."""
    run = RunData.load(make_run(tmp_path / "run", "bd:paper", 0.5, preset="paper", num_steps=12))
    assert run.label == "bd:paper"
    assert run.missing == []
    assert run.option("algo.distill.top_p") == 0.8
    assert run.option("algo.distill.no_such_option") is None
    assert run.num_steps == 12
    assert len(run.curves["train/loss"].values) == 12
    assert run.curves["eval/rouge_l"].steps == (2, 4, 6, 8, 10, 12)
    assert run.stage_seconds == {"rows": 73.2, "training": 311.0, "evaluation": 58.4}
    assert run.versions == {"openrlhf_bd": "0.1.0"}


def test_an_empty_folder_says_what_it_lacks(tmp_path: Path):
    """Missing files are named one by one and are no error."""
    run = RunData.load(tmp_path)
    assert [text.partition(" ")[0] for text in run.missing] == ["config.yaml", "metrics.jsonl", "evaluation.json"]
    assert run.label == tmp_path.name
    assert run.num_steps is None


def test_a_run_without_evaluation_is_named_by_its_algorithm(tmp_path: Path):
    """Before the evaluation a run goes by algorithm, and preset where the algorithm has presets."""
    robust = make_run(tmp_path / "a", "x", 0.5, with_evaluation=False, num_steps=2)
    seqkd = make_run(tmp_path / "b", "x", 0.5, algorithm="seqkd", with_evaluation=False, num_steps=2)
    assert [RunData.load(robust).label, RunData.load(seqkd).label] == ["bd:robust", "seqkd"]
    assert RunData.load(seqkd, label="mine").label == "mine"


def test_no_such_folder(tmp_path: Path):
    """A path that is no folder is an error with the path."""
    with pytest.raises(DataError, match="nowhere"):
        RunData.load(tmp_path / "nowhere")


def test_the_last_record_of_a_step_counts():
    """A step done again after a resume counts once, with its newer values, and steps come in order."""
    lines = ['{"step": 2, "train/loss": 5}', '{"step": 1, "train/loss": 4}', '{"step": 2, "train/loss": 3}']
    curve = parse_metrics(lines, source="m")["train/loss"]
    assert (curve.steps, curve.values) == ((1, 2), (4.0, 3.0))


def test_values_that_are_not_finite_are_kept_and_counted():
    """NaN, infinity and null are points without a value, not an error."""
    lines = [
        f'{{"step": {step}, "train/loss": {value}}}' for step, value in enumerate(["NaN", "Infinity", "null", "1"])
    ]
    curve = parse_metrics(lines, source="m")["train/loss"]
    assert curve.num_not_finite == 3
    assert math.isnan(curve.values[2])
    assert curve.values[3] == 1.0


def test_a_last_line_that_was_cut_is_ignored():
    """A killed process leaves half a line at the end: the rest counts; half a line elsewhere is damage."""
    whole, half = '{"step": 1, "train/loss": 4}', '{"step": 2, "tr'
    assert parse_metrics([whole, half], source="m")["train/loss"].steps == (1,)
    with pytest.raises(DataError, match="m:1: "):
        parse_metrics([half, whole], source="m")


def test_equal_labels_are_told_apart():
    """Runs with the same label get their folder's name, or a number where that is the same too."""
    runs = [RunData("bd", "one"), RunData("bd", "two"), RunData("sft", "one")]
    assert [run.label for run in with_distinct_labels(runs)] == ["bd (one)", "bd (two)", "sft"]
    runs = [RunData("bd", "one"), RunData("bd", "one")]
    assert [run.label for run in with_distinct_labels(runs)] == ["bd (#1)", "bd (#2)"]


def test_damaged_files_are_named(tmp_path: Path):
    """A damaged configuration or record is an error that names the file."""
    (tmp_path / "config.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(DataError, match=r"config\.yaml"):
        RunData.load(tmp_path)
    (tmp_path / "config.yaml").write_text("just text", encoding="utf-8")
    with pytest.raises(DataError, match="found a str"):
        RunData.load(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"run\.json"):
        RunData.load(tmp_path)


def test_the_wall_clock_is_kept_apart_from_metrics(tmp_path: Path):
    """Times of steps are read, and are no metric to draw."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_s": 50.0, "train/loss": 4}\n', encoding="utf-8")
    run = RunData.load(tmp_path)
    assert run.clock is not None
    assert (run.clock.steps, run.clock.values) == ((1,), (50.0,))
    assert list(run.curves) == ["train/loss"]


def test_scores_of_prompts_are_read_by_test_set_and_sampler(tmp_path: Path):
    """Responses beside an evaluation give the Rouge-L of each prompt under the name of its scores."""
    evaluation, responses = make_scored("BD", 0.5, ["dolly"], num_prompts=2)
    evaluation.write(tmp_path)
    write_responses(tmp_path, [*responses, responses[0].model_copy(update={"seed": 20, "rouge_l": 1.0})])
    run = RunData.load(tmp_path)
    assert list(run.by_prompt) == ["dolly", "dolly, top-p 0.8"]
    assert next(iter(run.by_prompt["dolly"].values())) == [responses[0].rouge_l, 1.0]


def test_prompts_of_different_files_are_not_paired(tmp_path: Path):
    """The same place in two test sets of one name is the same prompt only where the same is asked."""
    for name, instruction in (("a", "i"), ("b", "another")):
        evaluation, responses = make_scored("BD", 0.5, ["dolly"], num_prompts=2)
        evaluation.write(tmp_path / name)
        changed = [responses[0], responses[1].model_copy(update={"instruction": instruction})]
        write_responses(tmp_path / name, changed)
    one, other = (RunData.load(tmp_path / name).by_prompt["dolly"] for name in ("a", "b"))
    found = paired_difference(one, other)
    assert found is not None
    assert (found.num_prompts, found.num_left_out) == (1, 2)
