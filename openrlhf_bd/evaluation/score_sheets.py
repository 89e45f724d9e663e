"""Scores of a test set, and differences between methods prompt by prompt, as tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from openrlhf_bd.evaluation.figures import slug
from openrlhf_bd.evaluation.run_data import RunData
from openrlhf_bd.evaluation.sheets import EMPTY, CellStyle, Heading, Sheet, SheetCell, SheetRow
from openrlhf_bd.evaluation.statistics import PairedDifference, paired_difference
from openrlhf_bd.evaluation.tables import Cell, MainTable, Score, format_interval, format_spread

_WHOLE = "p = 1.0"


def scores_sheet(table: MainTable, *, name: str = "") -> Sheet:
    """All scores of one test set: a row a method, mean and spread over seeds with the interval below."""
    arrows = {"higher": " ↑", "lower": " ↓", None: ""}
    rows = tuple(
        SheetRow(
            row.label,
            tuple(score_cell(score, cell) for score, cell in zip(table.scores, row.cells, strict=True)),
            small="for reference" if row.is_reference else "",
            is_reference=row.is_reference,
        )
        for row in table.rows
    )
    data = []
    for row in table.rows:
        for score, cell in zip(table.scores, row.cells, strict=True):
            if (found := cell.estimate) is None:
                continue
            interval = ("", "") if found.half_width is None else found.interval
            values = " ".join(repr(value) for value in found.values)
            std = "" if found.std is None else found.std
            data.append((table.dataset, row.label, score.name, score.unit, found.mean, std, *interval, values))
    prompts, seeds = (" or ".join(map(str, counts)) for counts in (table.num_prompts, table.num_seeds))
    unscored = f"; {table.num_unscored} without a reference, not in Rouge-L" if table.num_unscored else ""
    marks = " Bold: best mean of its column. ≈: the interval overlaps with the best one's." if len(rows) > 1 else ""
    return Sheet(
        name or f"scores_{slug(table.dataset)}",
        f"{table.dataset}: {prompts} prompts, {seeds} seed{'' if table.num_seeds == (1,) else 's'}{unscored}",
        "Method",
        (tuple(Heading(f"{score.title}{arrows[score.better]}", score.unit) for score in table.scores),),
        rows,
        "Mean ± standard deviation over seeds; below it the 95 % confidence interval of the mean. ↑ higher is better, "
        f"↓ lower is better.{marks}",
        ("dataset", "method", "score", "unit", "mean", "std", "ci95_low", "ci95_high", "values"),
        tuple(data),
    )


def score_cell(score: Score, cell: Cell) -> SheetCell:
    """Mean and spread with the interval below; what is not measured is a dash."""
    if cell.estimate is None:
        return EMPTY
    style: CellStyle = cell.mark or ""
    mark = "≈ " if cell.mark == "close" else ""
    return SheetCell(mark + format_spread(score, cell.estimate), format_interval(score, cell.estimate), style)


def pairs_of(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Which methods are compared prompt by prompt: (first, second).

    BD with every other one; without BD, what the paper's other tables compare: each p with p = 1.0, and with
    chi-squared against without.
    """
    mains = [label for label in labels if label.casefold() == "bd"]
    mains += [label for label in labels if label.casefold().startswith("bd") and label not in mains]
    if mains:
        return [(mains[0], label) for label in labels if label != mains[0]]
    if _WHOLE in labels:
        return [(label, _WHOLE) for label in labels if label != _WHOLE]
    return [(label, other) for label in labels for other in labels if other == f"without {label.removeprefix('with ')}"]


def paired_sheet(methods: Sequence[RunData], reference_labels: Collection[str], *, name: str) -> Sheet | None:
    """Rouge-L of one method minus that of another, over the prompts of each test set, with 95 % intervals.

    Args:
        methods: with the scores of their prompts.
        reference_labels: methods that are not compared.
        name: file name of the table.

    Returns:
        None where there is no pair to compare, or no scores of single prompts.
    """
    scores = {run.label: run.by_prompt for run in methods if run.label not in reference_labels and run.by_prompt}
    pairs = pairs_of(list(scores))
    test_sets = list(dict.fromkeys(key for one, other in pairs for key in scores[one] if key in scores[other]))
    if not test_sets:
        return None
    found = {
        (pair, key): paired_difference(scores[pair[0]].get(key, {}), scores[pair[1]].get(key, {}))
        for pair in pairs
        for key in test_sets
    }
    return Sheet(
        name,
        "Prompt by prompt",
        "Rouge-L, difference",
        (tuple(Heading(key) for key in test_sets),),
        tuple(
            SheetRow(f"{one} minus {other}", tuple(_difference(found[(one, other), key]) for key in test_sets))
            for one, other in pairs
        ),
        "Mean difference over the prompts that both answered (above zero: the first one is better), with the 95 % "
        "interval of a bootstrap over prompts. Bold: the interval leaves zero out. It says what other prompts would "
        "change, not what another training seed would; of many comparisons some leave zero out by chance.",
        ("test_set", "method", "minus", "difference", "ci95_low", "ci95_high", "num_prompts", "num_left_out"),
        tuple(
            (key, *pair, item.mean, item.low, item.high, item.num_prompts, item.num_left_out)
            for (pair, key), item in found.items()
            if item is not None
        ),
    )


def _difference(pair: PairedDifference | None) -> SheetCell:
    if pair is None:
        return EMPTY
    interval = "" if pair.low is None else f"{pair.low:+.2f} to {pair.high:+.2f}"
    return SheetCell(f"{pair.mean:+.2f}", interval, "best" if pair.excludes_zero else "")
