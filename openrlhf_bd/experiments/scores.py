"""Scores on the terminal: one table for each group of an experiment; the report has everything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from openrlhf_bd.evaluation.results import Evaluation, labelled_paths
from openrlhf_bd.evaluation.tables import MainTable, main_table, terminal_cell

CAPTION = "mean±std over seeds; bold: best; ≈: its 95 % interval overlaps the best one's"


def score_tables(view: Mapping[str, Any]) -> Iterator[Table]:
    """A table of each group: its models by test sets and nuclei, in Rouge-L (without references: the first score).

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
        datasets = dict.fromkeys(name for found in evaluations.values() for name in found.datasets)
        if datasets:
            tables = [main_table([*evaluations.items()], name, reference_labels=references) for name in datasets]
            yield _group_table(group, tables, {label: label in references for label in evaluations})


def _group_table(group: str, tables: list[MainTable], labels: Mapping[str, bool]) -> Table:
    """Args: the group's name, what was found on each test set, and of each label whether it is for reference."""
    title = dict.fromkeys(f"{table.scores[0].title} ({table.scores[0].unit})" for table in tables)
    shown = Table(
        title=f"{group}: {' or '.join(title)}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        show_edge=False,
    )
    shown.add_column("model", overflow="fold")
    for table in tables:
        shown.add_column(Text(table.dataset.replace(", ", "\n")), justify="right", no_wrap=True)
    for label, is_reference in labels.items():
        cells = [_cell(table, label) for table in tables]
        shown.add_row(Text(label), *cells, style="dim" if is_reference else "")
    return shown


def _cell(table: MainTable, label: str) -> Text:
    # One digit: three test sets with two nuclei each are to fit into 80 columns.
    found = [row.cells[0] for row in table.rows if row.label == label]
    return terminal_cell(replace(table.scores[0], digits=1), found[0]) if found else Text("-")


def _evaluations(stage: Mapping[str, Any]) -> Iterator[tuple[str, Evaluation]]:
    for label, path in labelled_paths(Path(stage["folder"]), stage["models"]).items():
        if path.exists():
            yield label, Evaluation.read(path)
