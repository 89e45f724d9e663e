"""Scores of an experiment on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from openrlhf_bd.evaluation.results import DatasetScores, Evaluation, labelled_paths
from openrlhf_bd.experiments.scores import score_tables


def scores(rouge_l: list[float] | None) -> DatasetScores:
    return DatasetScores(
        num_prompts=2, seeds=[1, 2], rouge_l=rouge_l, accuracy=[0.5, 0.5], response_tokens=[3.0, 3.0], stop_rate=[1, 1]
    )


def test_a_group_is_one_table_that_fits(tmp_path: Path) -> None:
    """Three test sets under two nuclei are six columns of one table within 80, the teacher beside but not compared."""
    sets = [f"{name}{nucleus}" for name in ("dolly", "self_inst", "vicuna") for nucleus in ("", ", top-p 0.8")]
    values = {"Teacher": [40.0, 42.0], "SFT": [20.0, 21.0], "BD": [30.0, 31.0]}
    stage = {"name": "e", "group": "GPT-2 120M", "folder": str(tmp_path), "models": values, "reference": ["Teacher"]}
    for label, path in labelled_paths(tmp_path, values).items():
        datasets = {name: scores(values[label]) for name in sets}
        Evaluation(label=label, model=label, datasets=datasets, samples=[]).write(path)
    (table,) = score_tables({"stages": [stage, {"name": "train", "group": None}]})
    console = Console(width=80, record=True, file=(tmp_path / "out.txt").open("w", encoding="utf-8"))
    console.print(table)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines[0] == "GPT-2 120M: Rouge-L (0-100)"
    # Standard deviation of 30 and 31: sqrt(1/2).
    assert lines[-1].split() == ["BD", *["30.5±0.7"] * 6]
    assert lines[-3].split() == ["Teacher", *["41.0±1.4"] * 6]
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)


def test_without_references_the_first_score_is_shown(tmp_path: Path) -> None:
    """A test set that no record of has a reference shows its accuracy, and a model that lacks it a dash."""
    stage = {"name": "e", "group": None, "folder": str(tmp_path), "models": {"A": "", "B": ""}, "reference": []}
    paths = labelled_paths(tmp_path, ["A", "B"])
    Evaluation(label="A", model="a", datasets={"sums": scores(None)}, samples=[]).write(paths["A"])
    Evaluation(label="B", model="b", datasets={}, samples=[]).write(paths["B"])
    (table,) = score_tables({"stages": [stage]})
    console = Console(width=80, record=True, file=(tmp_path / "out.txt").open("w", encoding="utf-8"))
    console.print(table)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[0] == ["e:", "Accuracy", "(%)"]
    assert lines[-2:] == [["A", "50.0±0.0"], ["B", "-"]]
