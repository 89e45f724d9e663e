"""Tables of scores on the terminal: one for each group and test set of an experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from openrlhf_bd.evaluation.results import Evaluation, labelled_paths
from openrlhf_bd.evaluation.tables import main_table, terminal_table


def score_tables(view: Mapping[str, Any]) -> Iterator[Table]:
    """A table of each group and test set, of the models that were evaluated.

    Args:
        view: of an experiment, see `PipelineRecord.view`.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for stage in view["stages"]:
        if stage.get("models"):
            groups.setdefault(stage["group"] or stage["name"], []).append(stage)
    for group, stages in groups.items():
        evaluations = {label: found for stage in stages for label, found in _evaluations(stage)}
        references = [label for stage in stages for label in stage["reference"] if label in evaluations]
        for dataset in dict.fromkeys(name for found in evaluations.values() for name in found.datasets):
            with_it = [(label, found) for label, found in evaluations.items() if dataset in found.datasets]
            table = terminal_table(main_table(with_it, dataset, reference_labels=references))
            table.title = f"{group}: {dataset}"
            yield table


def _evaluations(stage: Mapping[str, Any]) -> Iterator[tuple[str, Evaluation]]:
    for label, path in labelled_paths(Path(stage["folder"]), stage["models"]).items():
        if path.exists():
            yield label, Evaluation.read(path)
