"""What a model keeps of general ability: standard benchmarks through lm-evaluation-harness, and `retention.json`.

The harness is an extra (`pip install 'openrlhf-bd[retention]'`) that nothing else needs. A task is written as soon as
it is done: an interrupted measurement goes on with the next one.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from openrlhf_bd.config import RetentionOptions
from openrlhf_bd.errors import ConfigError, DataError, RunFolderError
from openrlhf_bd.store.files import write_text
from openrlhf_bd.store.fingerprints import fingerprint_model_folder

RETENTION_FILE = "retention.json"


class Metric(BaseModel):
    """A figure of a task, in the harness's unit, and its standard error over documents (None where it has none)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    stderr: float | None


class TaskSettings(BaseModel):
    """How a task, or a group of tasks, was measured.

    Attributes:
        num_fewshot: as `RetentionOptions.num_fewshot`.
        limit: as `RetentionOptions.limit`.
        num_documents: documents that counted; None where the harness does not say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_fewshot: int | None
    limit: int | None
    num_documents: int | None


class Retention(BaseModel):
    """What is known of a model.

    Attributes:
        model: folder or name on a hub.
        fingerprint: of its weights.
        harness: version of lm-evaluation-harness.
        tasks: metrics by task and name; metrics of an answer filter are called "name,filter".
        settings: of each task or group that was asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    fingerprint: str
    harness: str
    tasks: dict[str, dict[str, Metric]] = {}
    settings: dict[str, TaskSettings] = {}

    def write(self, path: Path) -> None:
        """Write the file in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def read(path: Path) -> Retention:
        """Read `retention.json` from a folder, or the named file.

        Raises:
            DataError: the file is missing, or holds something else.
        """
        file_path = path if path.suffix == ".json" else path / RETENTION_FILE
        try:
            return Retention.model_validate_json(file_path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"{file_path}: not found, expected benchmarks; run `openrlhf-bd retention` first") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            raise DataError(
                f"{file_path}: {where}: {first['msg']}; expected the form that `openrlhf-bd retention` writes. Move "
                "the file away to measure anew"
            ) from None


@dataclass(frozen=True, slots=True)
class Benchmarks:
    """The harness with the wanted tasks, which exist and whose data is there. Made by `load_benchmarks`."""

    harness: Any
    manager: Any
    version: str
    tasks: tuple[str, ...]


def load_benchmarks(options: RetentionOptions) -> Benchmarks:
    """Find the harness, the tasks and their data, before any model is loaded.

    Raises:
        ConfigError: the harness is not installed, `include_path` is no folder, or a task is not known.
        DataError: a task's data cannot be loaded.
    """
    harness = import_harness()
    names = tuple(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
    if not names:
        raise ConfigError(f"--tasks is {options.tasks!r}; expected names of tasks, comma-separated")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise ConfigError(f"--include_path {options.include_path}: not found, expected a folder of YAML files")
    manager = harness.tasks.TaskManager(include_path=options.include_path)
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(f"--tasks: the harness has no task {name!r}{_nearest(name, manager.all_tasks)}")
    for name in names:
        try:
            manager.load([name])
        except (OSError, ValueError) as error:
            raise DataError(
                f"task {name}: its data cannot be loaded ({_first_line(error)}). The harness takes it from the Hugging "
                "Face hub or its local cache (HF_HOME), or from the files that the task's YAML names"
            ) from error
    return Benchmarks(harness, manager, str(harness.__version__), names)


def measure_retention(model: str, benchmarks: Benchmarks, options: RetentionOptions, output_path: Path) -> Retention:
    """Measure a model on the tasks that its file does not have yet, one after the other.

    Args:
        model: folder or name on a hub.
        benchmarks: the tasks.
        options: how they are measured.
        output_path: the file; tasks that it has stay.

    Raises:
        DataError: the model or the file cannot be read.
        RunFolderError: the file is about other weights, or another version of the harness.
    """
    found = _known(model, benchmarks, output_path)
    wanted = [name for name in benchmarks.tasks if not _is_measured(found.settings.get(name), options)]
    if not wanted:
        return found
    hosted = _host(model, benchmarks, options)
    for name in wanted:
        raw = benchmarks.harness.simple_evaluate(
            model=hosted,
            tasks=[name],
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=benchmarks.manager,
            log_samples=False,
        )
        settings = TaskSettings(
            num_fewshot=options.num_fewshot, limit=options.limit, num_documents=count_documents(raw)
        )
        found = found.model_copy(
            update={
                "tasks": found.tasks | parse_results(raw["results"]),
                "settings": found.settings | {name: settings},
            }
        )
        found.write(output_path)
    return found


def parse_results(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Metric]]:
    """The harness's results by task and metric.

    Args:
        results: of each task "metric,filter" and "metric_stderr,filter", beside entries that are no metric.
    """
    parsed: dict[str, dict[str, Metric]] = {}
    for task, entries in results.items():
        parsed[task] = {}
        for key, value in entries.items():
            name, _, answer_filter = key.partition(",")
            number = _number(value)
            if not answer_filter or name.endswith("_stderr") or number is None:
                continue
            shown = name if answer_filter == "none" else key
            stderr = _number(entries.get(f"{name}_stderr,{answer_filter}"))
            parsed[task][shown] = Metric(value=number, stderr=stderr)
    return parsed


def count_documents(raw: Mapping[str, Any]) -> int | None:
    """Documents that counted in a result of the harness, over all of its tasks; None where it does not say."""
    counts = raw.get("n-samples")
    return sum(int(task["effective"]) for task in counts.values()) if counts else None


def import_harness() -> Any:
    """The package lm_eval.

    Raises:
        ConfigError: it is not installed, or something that it needs is not.
    """
    try:
        harness = importlib.import_module("lm_eval")
        importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness cannot be imported ({error}); install it: pip install 'openrlhf-bd[retention]'"
        ) from None
    return harness


def _known(model: str, benchmarks: Benchmarks, path: Path) -> Retention:
    fingerprint = fingerprint_model_folder(model)
    if not path.exists():
        return Retention(model=model, fingerprint=fingerprint, harness=benchmarks.version)
    found = Retention.read(path)
    for what, there, now in (
        ("weights", found.fingerprint, fingerprint),
        ("harness", found.harness, benchmarks.version),
    ):
        if there != now:
            raise RunFolderError(
                f"{path}: holds benchmarks of other {what} ({there}, now {now}); move the file away to measure anew. "
                "Nothing was changed"
            )
    return found


def _is_measured(settings: TaskSettings | None, options: RetentionOptions) -> bool:
    return settings is not None and (settings.num_fewshot, settings.limit) == (options.num_fewshot, options.limit)


def _host(model: str, benchmarks: Benchmarks, options: RetentionOptions) -> Any:
    """The model as the harness hosts it."""
    import torch

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "float32" if options.dtype == "auto" and device == "cpu" else options.dtype
    models = importlib.import_module("lm_eval.models.huggingface")
    try:
        return models.HFLM(pretrained=model, device=device, dtype=dtype, batch_size=options.batch_size)
    except (OSError, ValueError) as error:
        raise DataError(f"{model}: the model cannot be loaded ({_first_line(error)})") from error


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {', '.join(matches)}?" if matches else "; `lm_eval ls tasks` lists what it has"
    return f"{hint} Tasks of your own: --include_path"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _number(value: Any) -> float | None:
    """A finite number; None for what is none, such as the harness's "N/A"."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None
