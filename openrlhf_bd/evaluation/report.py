"""The report: one self-contained HTML file about one run, or about any number of runs side by side.

Nothing in it is loaded from elsewhere, and it runs no script. Samples, labels and options are escaped by the template.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from openrlhf_bd.evaluation.comparison_figures import exposure_drawings, win_rate_drawing
from openrlhf_bd.evaluation.curve_catalogue import training_drawings, validation_drawings
from openrlhf_bd.evaluation.figures import (
    Drawing,
    LegendEntry,
    legend_entries,
    score_plot,
    set_sizes,
    slug,
    sorted_mass,
    write_files,
)
from openrlhf_bd.evaluation.judged import win_rates_sheet
from openrlhf_bd.evaluation.overview import facts, key_figures, settings_table, stage_bars
from openrlhf_bd.evaluation.page import render
from openrlhf_bd.evaluation.reading import how_to_read
from openrlhf_bd.evaluation.results import Sample
from openrlhf_bd.evaluation.retention_sheet import retention_sheet
from openrlhf_bd.evaluation.run_data import RunData, with_distinct_labels
from openrlhf_bd.evaluation.score_sheets import paired_sheet, scores_sheet
from openrlhf_bd.evaluation.sheets import Sheet, write_sheet
from openrlhf_bd.evaluation.tables import MainTable, main_table
from openrlhf_bd.evaluation.timeline_figures import timeline_drawings
from openrlhf_bd.evaluation.timeline_sheets import utilisation_sheets
from openrlhf_bd.store import StoreSummary
from openrlhf_bd.store.files import write_text

_PLOTTED_SCORES = ("rouge_l", "accuracy", "teacher_nll")


@dataclass(frozen=True, slots=True)
class Figures:
    """All figures of a report, by section; those of training metrics also by group."""

    scores: list[list[Drawing]]
    validation: list[Drawing]
    training: list[tuple[str, list[Drawing]]]
    sets: list[Drawing]
    exposure: list[Drawing]
    timelines: list[tuple[str, list[Drawing]]]
    win_rates: list[Drawing]

    @property
    def all(self) -> list[Drawing]:
        scores = [drawing for drawings in self.scores for drawing in drawings]
        grouped = [d for _, drawings in (*self.training, *self.timelines) for d in drawings]
        return [*scores, *self.validation, *grouped, *self.sets, *self.exposure, *self.win_rates]


@dataclass(frozen=True, slots=True)
class Sheets:
    """All tables of a report, by section; those of timelines also by run."""

    scores: list[Sheet]
    paired: Sheet | None
    win_rates: list[Sheet]
    retention: Sheet | None
    utilisation: list[tuple[str, list[Sheet]]]

    @property
    def all(self) -> list[Sheet]:
        single = [sheet for sheet in (self.paired, self.retention) if sheet is not None]
        return [*self.scores, *single, *self.win_rates, *(s for _, sheets in self.utilisation for s in sheets)]


@dataclass(frozen=True, slots=True)
class SampleCard:
    """One prompt with the response of each method."""

    dataset: str
    instruction: str
    input: str
    references: list[str]
    responses: list[tuple[LegendEntry, Sample]]


def write_report(
    runs: Sequence[RunData],
    output_path: Path,
    *,
    title: str,
    store_summary: StoreSummary | None = None,
    reference_labels: Collection[str] = (),
    figures_dir: Path | None = None,
) -> None:
    """Write the report of one run or of several.

    Args:
        runs: in the order in which they are to be shown; what a run lacks is said in the report.
        output_path: the HTML file; replaced in one step.
        title: heading of the page.
        store_summary: teacher's data, for the candidate sets; None leaves that section out and says so.
        reference_labels: methods shown for reference only (such as the teacher): never marked as best.
        figures_dir: also write every figure there as PNG and CSV, and the main tables as CSV.

    Raises:
        ValueError: no run.
        OSError: a file cannot be written.
    """
    if not runs:
        raise ValueError("write_report: found no run, expected at least one")
    named = with_distinct_labels(runs)
    legend = legend_entries([run.label for run in named])
    tables = main_tables(named, reference_labels)
    figures = Figures(
        scores=[_score_plots(table, legend) for table in tables],
        validation=validation_drawings(named, legend),
        training=training_drawings(named, legend),
        sets=_set_drawings(store_summary),
        exposure=[d for table in tables for d in exposure_drawings(named, table.dataset, legend)],
        timelines=[(run.label, _timeline_drawings(run, single=len(named) == 1)) for run in named if run.timeline],
        win_rates=[d for run in named if run.win_rates and (d := win_rate_drawing(run.win_rates, run.label))],
    )
    sheets = Sheets(
        scores=[scores_sheet(table) for table in tables],
        paired=paired_sheet(named, reference_labels, name="paired"),
        win_rates=[
            win_rates_sheet(run.win_rates, name=f"win_rates_{slug(run.label)}") for run in named if run.win_rates
        ],
        retention=retention_sheet(named, name="retention"),
        utilisation=[(run.label, utilisation_sheets(run.timeline, slug(run.label))) for run in named if run.timeline],
    )
    page = {
        "title": title,
        "runs": named,
        "legend": list(legend.values()),
        "facts": facts(named, store_summary),
        "key_figures": key_figures(named, tables, store_summary, reference_labels),
        "results": list(zip(sheets.scores, figures.scores, strict=True)),
        "sheets": sheets,
        "remarks": how_to_read(named, tables),
        "figures": figures,
        "samples": sample_cards(named, legend),
        "store": store_summary,
        "settings": settings_table(named),
        "stages": stage_bars(named),
        "configs": [(run.label, config_text(run)) for run in named if run.config],
        "missing": [(run.label, run.missing) for run in named if run.missing],
    }
    output_path.parent.mkdir(parents=True, exist_ok=True)
    write_text(output_path, render("report.html", page))
    if figures_dir is not None:
        for drawing in figures.all:
            write_files(drawing, figures_dir)
        for sheet in sheets.all:
            write_sheet(sheet, figures_dir)


def main_tables(runs: Sequence[RunData], reference_labels: Collection[str]) -> list[MainTable]:
    """The main table of each test set that any run was evaluated on.

    Args:
        runs: with labels that differ (`with_distinct_labels`).
        reference_labels: methods that are shown but not compared.
    """
    evaluations = [(run.label, run.evaluation) for run in runs if run.evaluation is not None]
    datasets = dict.fromkeys(name for _, evaluation in evaluations for name in evaluation.datasets)
    return [main_table(evaluations, name, reference_labels=reference_labels) for name in datasets]


def sample_cards(runs: Sequence[RunData], legend: dict[str, LegendEntry]) -> list[SampleCard]:
    """Responses of all methods to the same prompt, put together."""
    cards: dict[tuple[str, str, str], SampleCard] = {}
    for run in runs:
        for sample in run.evaluation.samples if run.evaluation is not None else []:
            reference = sample.reference
            references = [] if reference is None else [reference] if isinstance(reference, str) else reference
            card = cards.setdefault(
                (sample.dataset, sample.instruction, sample.input),
                SampleCard(sample.dataset, sample.instruction, sample.input, references, []),
            )
            card.responses.append((legend[run.label], sample))
    return list(cards.values())


def config_text(run: RunData) -> str:
    """The run's options as YAML, without keys of services."""
    config: dict[str, Any] = dict(run.config)
    logger = config.get("logger")
    if isinstance(logger, dict) and isinstance(logger.get("wandb"), dict):
        wandb = {name: value for name, value in logger["wandb"].items() if name != "key"}
        config["logger"] = {**logger, "wandb": wandb}
    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return text


def _score_plots(table: MainTable, legend: dict[str, LegendEntry]) -> list[Drawing]:
    """Plots of the scores that compare methods; one method alone needs none."""
    if len(table.rows) < 2:
        return []
    return [
        score_plot(table, column, legend) for column, score in enumerate(table.scores) if score.name in _PLOTTED_SCORES
    ]


def _set_drawings(store: StoreSummary | None) -> list[Drawing]:
    if store is None or store.sets is None or store.manifest.top_p is None:
        return []
    top_p = store.manifest.top_p
    drawings = [set_sizes(store.sets.size_histogram, top_p=top_p, quantiles=store.sets.size_quantiles)]
    if store.sets.sorted_mass is not None:
        drawings.append(sorted_mass(store.sets.sorted_mass, top_p=top_p))
    return drawings


def _timeline_drawings(run: RunData, *, single: bool) -> list[Drawing]:
    """Who worked and who waited; with the run's name in the figures' names where there are several runs."""
    drawings = timeline_drawings(run.timeline) if run.timeline is not None else []
    return drawings if single else [replace(item, name=f"{slug(run.label)}_{item.name}") for item in drawings]
