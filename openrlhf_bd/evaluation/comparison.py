"""The comparison report of an experiment: one self-contained HTML file about all its methods, groups and stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openrlhf_bd.evaluation.comparison_figures import (
    exposure_drawings,
    figure_1,
    stage_timeline,
    win_rate_drawing,
)
from openrlhf_bd.evaluation.comparison_tables import (
    Sampled,
    overview_sheet,
    paper_sheet,
    sampled_tables,
)
from openrlhf_bd.evaluation.costs import cost_sheet, time_sheet
from openrlhf_bd.evaluation.curve_catalogue import chosen_drawings, validation_drawings
from openrlhf_bd.evaluation.experiment_data import ExperimentData, Group, StageRecord, read_pipeline
from openrlhf_bd.evaluation.figures import (
    Drawing,
    LegendEntry,
    legend_entries,
    set_sizes,
    slug,
    write_files,
)
from openrlhf_bd.evaluation.judged import win_rates_sheet
from openrlhf_bd.evaluation.overview import KeyFigure, format_seconds
from openrlhf_bd.evaluation.page import render
from openrlhf_bd.evaluation.published import published
from openrlhf_bd.evaluation.reading import comparison_remarks
from openrlhf_bd.evaluation.report import SampleCard, sample_cards
from openrlhf_bd.evaluation.retention_sheet import retention_sheet
from openrlhf_bd.evaluation.score_sheets import paired_sheet, scores_sheet
from openrlhf_bd.evaluation.sheets import Sheet, write_sheet
from openrlhf_bd.evaluation.sorted_probabilities import sorted_probabilities
from openrlhf_bd.evaluation.timeline import read_timeline
from openrlhf_bd.evaluation.timeline_figures import timeline_drawings
from openrlhf_bd.evaluation.win_rates import WIN_RATES_FILE, WinRates
from openrlhf_bd.store import StoreReader, summary
from openrlhf_bd.store.files import write_text
from openrlhf_bd.store.folder import open_folder
from openrlhf_bd.store.manifest import StoreState

# Metrics that the comparison draws while training; all others are in the reports of the runs.
# What an experiment is about stands before its groups, by the name of what it reproduces.
_SUBJECTS = {"table3": "times", "figure1": "teacher", "figure2": "judge"}
_CURVES = (
    "train/loss",
    "train/set_size",
    "train/teacher_mass",
    "train/student_mass",
    "train/td_share",
    "train/reverse_kl",
    "train/stop_prob_end",
)


@dataclass(frozen=True, slots=True)
class GroupPage:
    """What the page shows of one group."""

    group: Group
    anchor: str
    scores: Sheet | None
    all_scores: list[Sheet]
    paired: Sheet | None
    retention: Sheet | None
    exposure: list[Drawing]
    validation: list[Drawing]
    training: list[Drawing]
    samples: list[SampleCard]
    missing: list[tuple[str, Sequence[str]]]

    @property
    def drawings(self) -> list[Drawing]:
        return [*self.exposure, *self.validation, *self.training]

    @property
    def sheets(self) -> list[Sheet]:
        return [sheet for sheet in (self.scores, self.paired, self.retention, *self.all_scores) if sheet is not None]


@dataclass(frozen=True, slots=True)
class StorePage:
    """What the page shows of one generation stage's rows, or why it shows nothing."""

    name: str
    text: str
    drawings: list[Drawing]


@dataclass(frozen=True, slots=True)
class JudgedPage:
    """What the page shows of one judging stage, or why it shows nothing."""

    name: str
    text: str
    sheet: Sheet | None
    drawing: Drawing | None


def write_comparison(pipeline: Mapping[str, Any], output_path: Path, figures_dir: Path | None = None) -> None:
    """Write the comparison report of an experiment. What is missing is said in it, never shown as zero.

    Args:
        pipeline: the experiment's view of `pipeline.json`: title, scale, published, and its stages in order.
        output_path: the HTML file; replaced in one step.
        figures_dir: also write every figure and table there as PNG and CSV.

    Raises:
        DataError: the record has no stages, or a file of a stage is damaged.
        OSError: a file cannot be written.
    """
    data = read_pipeline(pipeline)
    legend = legend_entries(list(dict.fromkeys(run.label for run in data.methods)))
    blocks = [(group, sampled_tables(group)) for group in data.groups]
    groups = [_group_page(data, group, sampled, legend) for group, sampled in blocks]
    stores = [_store_page(stage) for stage in data.stages if stage.kind == "generate"]
    judged = [_judged_page(stage) for stage in data.stages if stage.kind == "judge"]
    overview, times, cost = (
        overview_sheet(data, _scored(blocks)),
        time_sheet(data),
        cost_sheet(data.stages, price=_price(data)),
    )
    stages = stage_timeline(data.stages)
    timelines = _timelines(data.stages)
    page = {
        "data": data,
        "legend": list(legend.values()),
        "key_figures": _key_figures(data),
        "overview": overview,
        "groups": groups,
        "times": times,
        "leading": [section for name, section in _SUBJECTS.items() if name in {table.name for table in data.published}],
        "stores": stores,
        "judged": judged,
        "figure_2_note": " ".join(published("figure2").notes),
        "cost": cost,
        "stages": stages,
        "timelines": timelines,
        "remarks": comparison_remarks(data, [item.table for _, sampled in blocks for item in sampled]),
        "unfinished": [stage for stage in data.stages if not stage.finished],
    }
    output_path.parent.mkdir(parents=True, exist_ok=True)
    write_text(output_path, render("comparison.html", page))
    if figures_dir is None:
        return
    sheets = [overview, times, cost, *(item.sheet for item in judged), *(s for page in groups for s in page.sheets)]
    drawings = [stages, *(item.drawing for item in judged), *(d for page in groups for d in page.drawings)]
    drawings += [drawing for store in stores for drawing in store.drawings]
    drawings += [drawing for _, own in timelines for drawing in own]
    for sheet in sheets:
        if sheet is not None:
            write_sheet(sheet, figures_dir)
    for drawing in drawings:
        if drawing is not None:
            write_files(drawing, figures_dir)


def _scored(blocks: Sequence[tuple[Group, list[Sampled]]]) -> list[tuple[Group, list[Sampled]]]:
    return [(group, sampled) for group, sampled in blocks if sampled]


def _group_page(
    data: ExperimentData, group: Group, sampled: Sequence[Sampled], legend: dict[str, LegendEntry]
) -> GroupPage:
    prefix = f"{slug(group.name)}_"
    compared = [run for run in group.methods if run.label not in group.reference_labels]
    exposure = [
        drawing
        for item in sampled
        for drawing in exposure_drawings(group.methods, item.table.dataset, legend, prefix=prefix)
    ]
    return GroupPage(
        group=group,
        anchor=f"group-{slug(group.name)}",
        scores=paper_sheet(data, group, sampled),
        all_scores=[
            scores_sheet(item.table, name=f"{prefix}all_scores_{slug(item.table.dataset)}") for item in sampled
        ],
        paired=paired_sheet(group.methods, group.reference_labels, name=f"{prefix}paired"),
        retention=retention_sheet(group.methods, name=f"{prefix}retention"),
        exposure=exposure,
        validation=_named(validation_drawings(compared, legend), prefix),
        training=_named(chosen_drawings(compared, legend, _CURVES), prefix),
        samples=sample_cards(group.methods, legend),
        missing=[(run.label, run.missing) for run in group.methods if run.missing],
    )


def _named(drawings: Sequence[Drawing], prefix: str) -> list[Drawing]:
    return [replace(drawing, name=prefix + drawing.name) for drawing in drawings]


def _store_page(stage: StageRecord) -> StorePage:
    path = stage.folder / "teacher_data"
    if StoreState.find(open_folder(path)) is None:
        return StorePage(stage.name, f"No rows yet (state: {stage.state or 'unknown'}).", [])
    reader = StoreReader(path, require_complete=False)
    found = summary(reader)
    text = (
        f"{found.num_rows:,} responses, {found.num_response_tokens:,} tokens{'' if found.complete else ', incomplete'}."
    )
    if found.sets is None or found.manifest.top_p is None:
        return StorePage(stage.name, f"{text} No candidate sets, or whole vocabularies: Fig. 1 is not drawn.", [])
    sets = found.sets
    text += (
        f" Mean set {sets.mean_size:.2f} ids; {100 * sets.one_token_share:.1f} % hold one token; mean mass "
        f"{sets.mean_mass:.3f}; {100 * sets.out_of_set_rate:.2f} % of the sampled tokens lie outside their set."
    )
    sizes = set_sizes(sets.size_histogram, top_p=found.manifest.top_p, quantiles=sets.size_quantiles)
    drawings = [replace(sizes, name=f"set_sizes_{slug(stage.name)}", title=f"{stage.name}: size of the candidate sets")]
    if (probabilities := sorted_probabilities(reader)) is None:
        return StorePage(stage.name, f"{text} No log-probabilities: Fig. 1 is not drawn.", drawings)
    return StorePage(stage.name, text, [*figure_1(probabilities, stage.name), *drawings])


def _judged_page(stage: StageRecord) -> JudgedPage:
    if not (stage.folder / WIN_RATES_FILE).exists():
        return JudgedPage(stage.name, f"Not judged yet (state: {stage.state or 'unknown'}).", None, None)
    rates = WinRates.read(stage.folder)
    sheet = win_rates_sheet(rates, name=f"win_rates_{slug(stage.name)}")
    drawing = win_rate_drawing(rates, stage.name)
    return JudgedPage(stage.name, "" if drawing else "Nothing was judged.", sheet, drawing)


def _timelines(stages: Sequence[StageRecord]) -> list[tuple[str, list[Drawing]]]:
    """(stage, drawings) of the stages that recorded who worked when."""
    found = []
    for stage in stages:
        timeline = read_timeline(stage.folder)
        if timeline is not None and timeline.spans:
            found.append((stage.name, _named(timeline_drawings(timeline), f"{slug(stage.name)}_")))
    return found


def _price(data: ExperimentData) -> float | None:
    """Price of a GPU's hour, where all runs that name one name the same (--logger.cost_per_gpu_hour)."""
    prices = {price for run in data.methods if (price := run.option("logger.cost_per_gpu_hour")) is not None}
    return float(prices.pop()) if len(prices) == 1 else None


def _key_figures(data: ExperimentData) -> list[KeyFigure]:
    finished = sum(stage.finished for stage in data.stages)
    known = [stage for stage in data.stages if stage.seconds is not None]
    seconds = sum(stage.seconds or 0.0 for stage in known)
    evaluated = sum(run.evaluation is not None for run in data.methods)
    figures = [
        KeyFigure(f"{finished} of {len(data.stages)}", "stages finished", ""),
        KeyFigure(f"{len(data.groups)}", "groups", f"{evaluated} of {len(data.methods)} methods evaluated"),
    ]
    if known:
        figures.append(KeyFigure(format_seconds(seconds), "wall time", f"of {len(known)} stages, summed up"))
    return figures
