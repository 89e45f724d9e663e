"""A run folder as the report reads it: options, metrics, evaluation. Every file may be missing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from openrlhf_bd.errors import DataError
from openrlhf_bd.evaluation.results import EVALUATION_FILE, Evaluation

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over training: steps, increasing, and its values; a value that is not a number is NaN."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def num_not_finite(self) -> int:
        return sum(not math.isfinite(value) for value in self.values)


@dataclass(frozen=True, slots=True)
class RunData:
    """What is known of one run.

    Attributes:
        label: name of the method in tables and figures.
        folder: name of the run folder, "" if there is none.
        config: resolved options, nested by section; empty if unknown.
        curves: metrics by their full name ("train/loss", "eval/rouge_l").
        evaluation: scores, or None.
        stage_seconds: wall time of each finished stage, seconds.
        versions: versions of the software, by package.
        missing: what the folder lacks, one sentence each.
    """

    label: str
    folder: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    missing: Sequence[str] = ()

    @staticmethod
    def load(folder: Path, *, label: str | None = None) -> RunData:
        """Read a run folder.

        Args:
            folder: the run folder.
            label: name of the method; None: the evaluation's label, else algorithm and preset, else the folder's name.

        Raises:
            DataError: there is no such folder, or one of its files is damaged.
        """
        if not folder.is_dir():
            raise DataError(f"{folder}: not found, expected the folder of a run (--ckpt.output_dir)")
        missing: list[str] = []
        config = _read_config(folder / CONFIG_FILE, missing)
        curves = _read_metrics(folder / METRICS_FILE, missing)
        evaluation = _read_evaluation(folder, missing)
        stage_seconds, versions = _read_record(folder / RUN_FILE)
        return RunData(
            label=label or _default_label(folder, config, evaluation),
            folder=folder.name,
            config=config,
            curves=curves,
            evaluation=evaluation,
            stage_seconds=stage_seconds,
            versions=versions,
            missing=missing,
        )

    def option(self, name: str) -> Any:
        """Value of an option by its dotted name, None if the run's configuration does not have it."""
        found: Any = self.config
        for key in name.split("."):
            if not isinstance(found, Mapping) or key not in found:
                return None
            found = found[key]
        return found

    @property
    def num_steps(self) -> int | None:
        """Last step with metrics."""
        return max((curve.steps[-1] for curve in self.curves.values()), default=None)


def with_distinct_labels(runs: Sequence[RunData]) -> list[RunData]:
    """The same runs; where labels repeat, the folder's name (or a number) makes them different."""
    labels = [run.label for run in runs]
    names = [(run.label, run.folder) for run in runs]
    named: list[RunData] = []
    for number, run in enumerate(runs, start=1):
        if labels.count(run.label) == 1:
            named.append(run)
        else:
            suffix = run.folder if run.folder and names.count((run.label, run.folder)) == 1 else f"#{number}"
            named.append(replace(run, label=f"{run.label} ({suffix})"))
    return named


def parse_metrics(lines: Sequence[str], *, source: str) -> dict[str, Curve]:
    """Curves of the lines of a metrics file.

    A step that stands there twice (a resumed run did it again) counts with its last record. A last line that is cut
    short, as a killed process leaves it, is ignored.

    Args:
        lines: JSON objects with "step" and numbers by name.
        source: file name in messages.

    Raises:
        DataError: a line before the last is no such object.
    """
    by_name: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            if number == len(lines):
                continue
            raise DataError(
                f'{source}:{number}: found {line[:80]!r}, expected a JSON object with "step"; mend or remove the line'
            ) from error
        for name, value in record.items():
            if "/" in name and (value is None or isinstance(value, int | float)):
                by_name.setdefault(name, {})[step] = math.nan if value is None else float(value)
    return {
        name: Curve(tuple(sorted(values)), tuple(values[step] for step in sorted(values)))
        for name, values in by_name.items()
    }


def _read_config(path: Path, missing: list[str]) -> Mapping[str, Any]:
    if not path.exists():
        missing.append(f"{CONFIG_FILE} is missing: options are not shown")
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no YAML ({error}); expected the options that the run was started with") from error
    if content is not None and not isinstance(content, Mapping):
        raise DataError(f"{path}: found a {type(content).__name__}, expected options by section")
    return content or {}


def _read_metrics(path: Path, missing: list[str]) -> dict[str, Curve]:
    curves = {}
    if path.exists():
        curves = parse_metrics(path.read_text(encoding="utf-8", errors="replace").splitlines(), source=str(path))
    if not curves:
        missing.append(f"{METRICS_FILE} is missing or empty: no learning curves")
    return curves


def _read_evaluation(folder: Path, missing: list[str]) -> Evaluation | None:
    if not (folder / EVALUATION_FILE).exists():
        missing.append(f"{EVALUATION_FILE} is missing: no scores and no responses; run `openrlhf-bd evaluate`")
        return None
    return Evaluation.read(folder)


def _read_record(path: Path) -> tuple[dict[str, float], dict[str, str]]:
    """(seconds by stage, versions by package) of the run's record, as far as they stand there."""
    if not path.exists():
        return {}, {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no JSON ({error}); expected the record of the run") from error
    stages = {
        str(stage): float(record["seconds"])
        for stage, record in content.get("stages", {}).items()
        if isinstance(record, Mapping) and isinstance(record.get("seconds"), int | float)
    }
    versions = {str(package): str(version) for package, version in content.get("versions", {}).items()}
    if "version" in content:
        versions = {"openrlhf_bd": str(content["version"])} | versions
    return stages, versions


def _default_label(folder: Path, config: Mapping[str, Any], evaluation: Evaluation | None) -> str:
    if evaluation is not None:
        return evaluation.label
    distill = config.get("algo", {}).get("distill", {})
    if "name" not in distill:
        return folder.name
    return f"{distill['name']}:{distill['preset']}" if distill["name"] == "bd" else str(distill["name"])
