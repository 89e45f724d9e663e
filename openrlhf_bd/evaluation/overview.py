"""What was run, in brief: facts of the header, key figures, settings by method, wall time by stage."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_bd.evaluation.run_data import RunData
from openrlhf_bd.evaluation.tables import MainTable
from openrlhf_bd.store import StoreSummary

SETTINGS = (
    ("algorithm", "algo.distill.name"),
    ("preset", "algo.distill.preset"),
    ("top-p of the sets", "algo.distill.top_p"),
    ("end of sequence in every set", "algo.distill.include_eos"),
    ("alpha", "algo.distill.alpha"),
    ("gamma", "algo.distill.gamma"),
    ("shift of Q", "algo.distill.q_shift"),
    ("lower clip of Q", "algo.distill.q_min"),
    ("linear term", "algo.distill.linear_term"),
    ("tail coefficient", "algo.distill.tail_coef"),
    ("pre-training coefficient", "algo.distill.pretrain_coef"),
    ("z-loss coefficient", "algo.distill.z_loss_coef"),
    ("starting student", "actor.model_name_or_path"),
    ("learning rate", "actor.adam.lr"),
    ("batch, rows", "train.batch_size"),
    ("epochs", "train.max_epochs"),
    ("longest row, tokens", "data.max_len"),
    ("responses a prompt", "rollout.n_samples_per_prompt"),
    ("seed", "train.seed"),
)
# Options of the objective: they say nothing about other algorithms.
_BD_ONLY = frozenset(
    option
    for _, option in SETTINGS
    if option.startswith("algo.distill.")
    and option not in ("algo.distill.name", "algo.distill.pretrain_coef", "algo.distill.z_loss_coef")
)


_DOES_NOT_APPLY = "–"


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A figure of the strip at the top: value, what it is, and where it comes from."""

    value: str
    title: str
    note: str


@dataclass(frozen=True, slots=True)
class Setting:
    """One option: its value in each run, and whether the runs differ in it."""

    title: str
    values: tuple[str, ...]
    differs: bool


@dataclass(frozen=True, slots=True)
class StageBar:
    """Wall time of one run: (stage, shown time, share of the longest run in percent)."""

    label: str
    total: str
    parts: tuple[tuple[str, str, float], ...]


def facts(runs: Sequence[RunData], store: StoreSummary | None) -> list[tuple[str, str]]:
    """(name, text) of what was run: models, data, steps, versions, as far as they are known."""
    found = [
        ("Teacher", _teachers(runs)),
        ("Student", _names(runs, "actor.model_name_or_path")),
        ("Prompts", _names(runs, "data.prompt_dataset")),
        ("Pre-training text", _names(runs, "data.pretrain_dataset")),
        ("Steps", _range([run.num_steps for run in runs])),
        ("Test", _tests(runs)),
        ("Versions", _versions(runs, store)),
    ]
    return [(name, text) for name, text in found if text]


def key_figures(
    runs: Sequence[RunData],
    tables: Sequence[MainTable],
    store: StoreSummary | None,
    reference_labels: Collection[str],
) -> list[KeyFigure]:
    """Figures of the summary strip: best scores on the first test set, teacher's data, wall time."""
    figures = _best_scores(tables[0], reference_labels) if tables else []
    if store is not None:
        figures.append(
            KeyFigure(_count(store.num_response_tokens), "teacher tokens", f"{_count(store.num_rows)} responses")
        )
        if store.sets is not None:
            figures.append(
                KeyFigure(
                    f"{store.sets.mean_size:.1f}",
                    "ids a candidate set",
                    f"p = {store.manifest.top_p:g}; {store.sets.one_token_share:.0%} hold one token",
                )
            )
    seconds = sum(sum(run.stage_seconds.values()) for run in runs)
    if seconds > 0:
        stages = "all stages" if len(runs) == 1 else f"all stages of {len(runs)} runs"
        figures.append(KeyFigure(format_seconds(seconds), "wall time", stages))
    return figures


def settings_table(runs: Sequence[RunData]) -> list[Setting]:
    """Options of every run that has a configuration, in a fixed order."""
    settings = []
    for title, option in SETTINGS:
        values = tuple(_setting(run, option) for run in runs if run.config)
        if values:
            settings.append(Setting(title, values, len(set(values) - {_DOES_NOT_APPLY}) > 1))
    return settings


def stage_bars(runs: Sequence[RunData]) -> list[StageBar]:
    """Wall time of each run by stage, on one scale, with the GPUs that each held and what they cost."""
    totals = [sum(run.stage_seconds.values()) for run in runs]
    longest = max(totals, default=0.0)
    return [
        StageBar(
            run.label,
            _spent(run, total),
            tuple((stage, _stage_time(run, stage), 100 * s / longest) for stage, s in run.stage_seconds.items()),
        )
        for run, total in zip(runs, totals, strict=True)
        if total > 0
    ]


def gpu_hours(run: RunData) -> float | None:
    """GPUs held times hours, over the stages of a run; None where it held none, or where that is not on record."""
    hours = sum(run.stage_seconds[stage] * gpus for stage, gpus in run.stage_gpus.items()) / 3600
    return hours or None


def _spent(run: RunData, seconds: float) -> str:
    """Wall time of a run, its GPU hours, and what they cost (--logger.cost_per_gpu_hour)."""
    parts, hours = [format_seconds(seconds)], gpu_hours(run)
    if hours is not None:
        parts.append(f"{hours:.2f} GPU hours" if hours < 10 else f"{hours:,.0f} GPU hours")
        if (price := run.option("logger.cost_per_gpu_hour")) is not None:
            parts.append(f"cost {hours * price:,.2f}")
    return ", ".join(parts)


def _stage_time(run: RunData, stage: str) -> str:
    gpus = run.stage_gpus.get(stage, 0)
    return format_seconds(run.stage_seconds[stage]) + (f" × {gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "")


def format_seconds(seconds: float) -> str:
    """A duration as people say it: "42 s", "3 min 05 s", "31 min", "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _best_scores(table: MainTable, reference_labels: Collection[str]) -> list[KeyFigure]:
    figures = []
    for column, score in enumerate(table.scores):
        cells = [
            (row.label, cell)
            for row in table.rows
            if row.label not in reference_labels
            and (cell := row.cells[column].estimate) is not None
            and math.isfinite(cell.mean)
        ]
        if score.better is None or not cells:
            continue
        sign = 1 if score.better == "higher" else -1
        label, best = max(cells, key=lambda item: sign * item[1].mean)
        unit = "%" if score.unit == "%" else ""
        name = score.title if len(cells) == 1 else f"{'best' if sign > 0 else 'lowest'} {score.title}"
        figures.append(KeyFigure(f"{score.format(best.mean)}{unit}", f"{name}, {table.dataset}", label))
    return figures


def _setting(run: RunData, option: str) -> str:
    if option in _BD_ONLY and run.option("algo.distill.name") != "bd":
        return _DOES_NOT_APPLY
    value = run.option(option)
    return _path_name(value) if option.endswith("_path") else _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _path_name(value: Any) -> str:
    """Last two parts of a path: enough to tell models apart, and no more of the machine than that."""
    return "/".join(Path(str(value)).parts[-2:]) if value else "none"


def _names(runs: Sequence[RunData], option: str) -> str:
    values = [run.option(option) for run in runs]
    return ", ".join(dict.fromkeys(_path_name(value) for value in values if value))


def _teachers(runs: Sequence[RunData]) -> str:
    """Names of the teachers; those of routes with the value that chooses them."""
    routes = [entry.partition("=") for run in runs for entry in str(run.option("teacher.routes") or "").split(",")]
    routed = dict.fromkeys(f"{_path_name(model.strip())} ({value.strip()})" for value, _, model in routes if model)
    named = (_names(runs, "teacher.model_name_or_path"), _names(runs, "teacher.api_model"), *routed)
    return ", ".join(name for name in named if name)


def _range(numbers: Sequence[int | None]) -> str:
    known = sorted({number for number in numbers if number is not None})
    if not known:
        return ""
    return f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"


def _tests(runs: Sequence[RunData]) -> str:
    sets = {
        name: item.num_prompts
        for run in runs
        if run.evaluation is not None
        for name, item in run.evaluation.datasets.items()
    }
    seeds = {
        tuple(item.seeds) for run in runs if run.evaluation is not None for item in run.evaluation.datasets.values()
    }
    if not sets:
        return ""
    prompts = ", ".join(f"{name} ({num_prompts:,} prompts)" for name, num_prompts in sets.items())
    return f"{prompts}; seeds {' or '.join(' '.join(map(str, group)) for group in sorted(seeds))}"


def _versions(runs: Sequence[RunData], store: StoreSummary | None) -> str:
    versions: dict[str, str] = dict(store.manifest.versions) if store is not None else {}
    for run in runs:
        versions |= run.versions
    return ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))


def _count(number: int) -> str:
    if number >= 1_000_000:
        return f"{number / 1e6:.1f} M"
    return f"{number / 1e3:.0f} k" if number >= 10_000 else f"{number:,}"
