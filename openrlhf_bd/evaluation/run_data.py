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
from openrlhf_bd.evaluation.results import EVALUATION_FILE, Evaluation, read_responses, responses_path
from openrlhf_bd.evaluation.retention import RETENTION_FILE, Retention
from openrlhf_bd.evaluation.timeline import Timeline, read_timeline
from openrlhf_bd.evaluation.win_rates import WIN_RATES_FILE, WinRates

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"
# Name of the wall clock among the curves of a metrics file, seconds.
CLOCK = "time_s"

# Rouge-L of the responses to each prompt, by name of the test set as in `Evaluation.datasets`.
ScoresByPrompt = Mapping[str, Mapping[str, Sequence[float]]]


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
        clock: wall clock at each step with metrics, seconds; None if unknown.
        evaluation: scores, or None.
        by_prompt: Rouge-L of each prompt's responses by test set, as far as they were kept.
        stage_seconds: wall time of each finished stage, seconds.
        stage_gpus: GPUs that each of them held; stages of older runs are not there.
        timeline: who worked and who waited, or None.
        win_rates: of a judge, or None.
        retention: standard benchmarks, or None.
        versions: versions of the software, by package.
        missing: what the folder lacks, one sentence each.
    """

    label: str
    folder: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    clock: Curve | None = None
    evaluation: Evaluation | None = None
    by_prompt: ScoresByPrompt = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    stage_gpus: Mapping[str, int] = field(default_factory=dict)
    timeline: Timeline | None = None
    win_rates: WinRates | None = None
    retention: Retention | None = None
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
        clock = curves.pop(CLOCK, None)
        evaluation = _read_evaluation(folder, missing)
        stages, versions = _read_record(folder / RUN_FILE)
        return RunData(
            label=label or _default_label(folder, config, evaluation),
            folder=folder.name,
            config=config,
            curves=curves,
            clock=clock,
            evaluation=evaluation,
            by_prompt={} if evaluation is None else scores_by_prompt(folder, evaluation),
            stage_seconds={stage: float(record["seconds"]) for stage, record in stages.items()},
            stage_gpus={stage: int(record["gpus"]) for stage, record in stages.items() if "gpus" in record},
            timeline=read_timeline(folder),
            win_rates=WinRates.read(folder) if (folder / WIN_RATES_FILE).exists() else None,
            retention=Retention.read(folder) if (folder / RETENTION_FILE).exists() else None,
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
    def is_robust(self) -> bool:
        """Whether this is Bellman Distill with the preset that changes its objective."""
        return self.option("algo.distill.name") == "bd" and self.option("algo.distill.preset") == "robust"

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
    """Curves of the lines of a metrics file, with the wall clock of each step as `CLOCK`.

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
            if ("/" in name or name == CLOCK) and (value is None or isinstance(value, int | float)):
                by_name.setdefault(name, {})[step] = math.nan if value is None else float(value)
    return {
        name: Curve(tuple(sorted(values)), tuple(values[step] for step in sorted(values)))
        for name, values in by_name.items()
    }


def scores_by_prompt(path: Path, evaluation: Evaluation) -> ScoresByPrompt:
    """Rouge-L by test set and prompt from the responses kept beside an evaluation; empty where none were kept.

    Args:
        path: folder or file of the evaluation.
        evaluation: names its test sets.

    Raises:
        DataError: the file of the responses is damaged.
    """
    if not responses_path(path).exists():
        return {}
    names = {(item.test_set or name, item.top_p): name for name, item in evaluation.datasets.items()}
    found: dict[str, dict[str, list[float]]] = {}
    for response in read_responses(path):
        name = names.get((response.test_set, response.top_p))
        if name is not None and response.rouge_l is not None:
            # Another file of the same name has other prompts under the same ids.
            prompt = f"{response.prompt_id} {response.instruction}\n{response.input}"
            found.setdefault(name, {}).setdefault(prompt, []).append(response.rouge_l)
    return found


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


def _read_record(path: Path) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """(record of each stage that has seconds, versions by package) of the run's record, as far as they stand there."""
    if not path.exists():
        return {}, {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no JSON ({error}); expected the record of the run") from error
    stages = {
        str(stage): record
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
