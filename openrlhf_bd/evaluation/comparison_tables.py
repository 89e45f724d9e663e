"""Tables of the comparison: scores as the paper lays them out, with its own beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openrlhf_bd.evaluation.experiment_data import ExperimentData, Group
from openrlhf_bd.evaluation.figures import slug
from openrlhf_bd.evaluation.published import TEST_SETS
from openrlhf_bd.evaluation.score_sheets import score_cell
from openrlhf_bd.evaluation.sheets import EMPTY, NOTHING, Heading, Sheet, SheetCell, SheetRow
from openrlhf_bd.evaluation.tables import Cell, MainTable, Score, main_table

_ROUGE_L = "rouge_l"
_TITLES = {"dolly": "Dolly", "self_inst": "SelfInst", "vicuna": "Vicuna"}


@dataclass(frozen=True, slots=True)
class Sampled:
    """Scores of a group on one test set by one sampler."""

    test_set: str
    top_p: float | None
    table: MainTable

    @property
    def sampler(self) -> str:
        return "ours" if self.top_p is None else f"top-p {self.top_p:.1f}"


def sampled_tables(group: Group) -> list[Sampled]:
    """The main table of each test set and sampler of a group, samplers of one test set side by side, widest first."""
    evaluations = [(run.label, run.evaluation) for run in group.methods if run.evaluation is not None]
    found: dict[str, Sampled] = {}
    for _, evaluation in evaluations:
        for name, item in evaluation.datasets.items():
            if name not in found:
                table = main_table(evaluations, name, reference_labels=group.reference_labels)
                found[name] = Sampled(item.test_set or name, item.top_p, table)
    order = list(dict.fromkeys(item.test_set for item in found.values()))
    return sorted(found.values(), key=lambda item: (order.index(item.test_set), -(item.top_p or 0.0)))


def paper_sheet(data: ExperimentData, group: Group, sampled: Sequence[Sampled]) -> Sheet | None:
    """Methods by test sets and samplers, Rouge-L, each test set's published figure beside ours (Table 1's block).

    Rows that the paper has and we have not are there too, and say so. None where nothing has references.
    """
    shown = [item for item in sampled if _score(item) is not None]
    if not shown:
        return None
    test_sets = list(dict.fromkeys(item.test_set for item in shown))
    labels = [run.label for run in group.methods]
    absent = _absent_rows(data, group, labels)
    has_published = any(_published(data, group, label, name) is not None for label in labels for name in test_sets)
    has_published = has_published or bool(absent)
    headings, samplers = [], []
    for name in test_sets:
        own = [Heading(item.sampler, "ours") for item in shown if item.test_set == name]
        samplers += [*own, *([Heading("published", "paper")] if has_published else [])]
        headings.append(Heading(_TITLES.get(name, name), span=len(own) + has_published))
    rows = [
        SheetRow(
            label,
            tuple(_row_cells(data, group, label, test_sets, shown, has_published)),
            small=_row_note(group, label, label in absent),
            is_reference=label in group.reference_labels or label in absent,
        )
        for label in [*labels, *absent]
    ]
    return Sheet(
        f"{slug(group.name)}_scores",
        f"{group.name}: Rouge-L",
        "Method",
        (tuple(headings), tuple(samplers)),
        tuple(rows),
        _paper_note(data, has_published),
        ("group", "method", "test_set", "top_p", "mean", "std", "ci95_low", "ci95_high", "num_seeds", "published"),
        tuple(_paper_data(data, group, shown)),
    )


def overview_sheet(data: ExperimentData, blocks: Sequence[tuple[Group, Sequence[Sampled]]]) -> Sheet | None:
    """All groups in one table, as the paper lays Table 1 out: families beside each other, sizes below each other.

    A cell has the mean of every sampler, and the published figure below. None with fewer than two groups.
    """
    if len(blocks) < 2:
        return None
    families: dict[str, list[tuple[Group, Sequence[Sampled]]]] = {}
    for group, sampled in blocks:
        families.setdefault(_family(group.name), []).append((group, sampled))
    test_sets = list(dict.fromkeys(item.test_set for _, sampled in blocks for item in sampled))
    rows: list[SheetRow] = []
    for index in range(max(map(len, families.values()))):
        block = [members[index] if index < len(members) else None for members in families.values()]
        rows.append(SheetRow(", ".join(item[0].name for item in block if item is not None), ()))
        labels = dict.fromkeys(run.label for item in block if item is not None for run in item[0].methods)
        for label in labels:
            cells = [_overview_cell(data, item, label, name) for item in block for name in test_sets]
            reference = all(label in item[0].reference_labels for item in block if item and item[0].method(label))
            rows.append(SheetRow(label, tuple(cells), is_reference=reference))
    samplers = list(dict.fromkeys(item.sampler for _, sampled in blocks for item in sampled))
    return Sheet(
        "overview",
        "All groups: Rouge-L",
        "Method",
        (
            tuple(Heading(family, span=len(test_sets)) for family in families),
            tuple(Heading(_TITLES.get(name, name)) for _ in families for name in test_sets),
        ),
        tuple(rows),
        f"Means of {' | '.join(samplers)}; below, for orientation only, what the paper reports. Bold: best mean "
        "of its group at the first sampler. Spread and intervals are in the groups' own tables.",
        ("group", "method", "test_set", "top_p", "mean", "std", "ci95_low", "ci95_high", "num_seeds", "published"),
        tuple(line for group, sampled in blocks for line in _paper_data(data, group, sampled)),
    )


def _score(item: Sampled) -> Score | None:
    return next((score for score in item.table.scores if score.name == _ROUGE_L), None)


def _rouge_cell(item: Sampled, label: str) -> Cell | None:
    score = _score(item)
    row = next((row for row in item.table.rows if row.label == label), None)
    if score is None or row is None:
        return None
    return row.cells[item.table.scores.index(score)]


def _row_cells(
    data: ExperimentData,
    group: Group,
    label: str,
    test_sets: Sequence[str],
    shown: Sequence[Sampled],
    has_published: bool,
) -> list[SheetCell]:
    cells = []
    for name in test_sets:
        for item in (item for item in shown if item.test_set == name):
            score, cell = _score(item), _rouge_cell(item, label)
            cells.append(EMPTY if score is None or cell is None else score_cell(score, cell))
        if has_published:
            figure = _published(data, group, label, name)
            cells.append(EMPTY if figure is None else SheetCell(f"{figure:.1f}", style="published"))
    return cells


def _overview_cell(
    data: ExperimentData, block: tuple[Group, Sequence[Sampled]] | None, label: str, test_set: str
) -> SheetCell:
    if block is None or block[0].method(label) is None:
        return EMPTY
    group, sampled = block
    cells = [(item, _rouge_cell(item, label)) for item in sampled if item.test_set == test_set]
    means = [
        score.format(cell.estimate.mean)
        for item, cell in cells
        if (score := _score(item)) is not None and cell is not None and cell.estimate is not None
    ]
    figure = _published(data, group, label, test_set)
    best = bool(cells) and cells[0][1] is not None and cells[0][1].mark == "best"
    return SheetCell(
        " | ".join(means) or NOTHING, "" if figure is None else f"paper {figure:.1f}", "best" if best else ""
    )


def _row_note(group: Group, label: str, is_absent: bool) -> str:
    run = group.method(label)
    temperatures = {item.temperature for item in run.evaluation.datasets.values()} if run and run.evaluation else set()
    other = [f"temperature {t:g}" for t in temperatures if t is not None and t != 1.0]
    notes = ["not run here"] if is_absent else ["for reference"] if label in group.reference_labels else []
    if run is not None and run.evaluation is None:
        notes.append("not evaluated")
    return ", ".join([*notes, *other])


def _published(data: ExperimentData, group: Group, label: str, test_set: str) -> float | None:
    run = group.method(label)
    # A changed objective is not the published method, whatever the row is called.
    return None if run is not None and run.is_robust else data.find_published(group.name, label, test_set)


def _absent_rows(data: ExperimentData, group: Group, labels: Sequence[str]) -> list[str]:
    """Rows that the paper has for this group, in a table of which we have a row, and that we do not have."""
    absent: dict[str, None] = {}
    for table in (table for table in data.published if table.columns == TEST_SETS):
        rows, have = table.rows_of(group.name), {table.row_name(label) for label in labels}
        if have & rows.keys():
            absent |= dict.fromkeys(row for row in rows if row not in have)
    return list(absent)


def _paper_data(data: ExperimentData, group: Group, shown: Sequence[Sampled]) -> list[tuple[Any, ...]]:
    lines: list[tuple[Any, ...]] = []
    for item in shown:
        for row in item.table.rows:
            cell = _rouge_cell(item, row.label)
            if cell is None or (found := cell.estimate) is None:
                continue
            low, high = ("", "") if found.half_width is None else found.interval
            figure = _published(data, group, row.label, item.test_set)
            spread = "" if found.std is None else found.std
            lines.append(
                (
                    group.name,
                    row.label,
                    item.test_set,
                    item.top_p,
                    found.mean,
                    spread,
                    low,
                    high,
                    found.num_values,
                    figure,
                )
            )
    return lines


def _paper_note(data: ExperimentData, has_published: bool) -> str:
    note = (
        "Ours: mean ± standard deviation over sampling seeds, below it the 95 % confidence interval of the mean. Bold: "
        "best mean of its column; ≈: the interval overlaps with the best one's."
    )
    if not has_published:
        return note
    sources = ", ".join(table.source for table in data.published if table.columns == TEST_SETS)
    return (
        f"{note} In italics, for orientation only: what the paper reports ({sources}), with other data, models and "
        "training."
    )


def _family(group: str) -> str:
    return group.rpartition(" ")[0] or group
