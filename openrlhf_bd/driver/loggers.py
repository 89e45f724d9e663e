"""OpenRLHF's TensorBoard and Weights & Biases loggers, as a run opens them: without keys in what they keep."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from openrlhf_bd.config import Config
from openrlhf_bd.evaluation.results import Evaluation
from openrlhf_bd.evaluation.tables import SCORES
from openrlhf_bd.store.files import write_text

# Where a run is resumed, or evaluated later, Weights & Biases goes on with the same run.
WANDB_ID_FILE = "wandb_run_id"
# Names of test sets may have spaces and commas; those of metrics have none.
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


class _Options(dict[str, Any]):
    """Options that are read as attributes, as OpenRLHF does, and kept as a dictionary, as Weights & Biases does."""

    __getattr__ = dict.__getitem__


def open_loggers(config: Config, folder: Path) -> list[Any]:
    """The loggers of a run; close each of them.

    TensorBoard always; Weights & Biases where there is a key (--logger.wandb.key, WANDB_API_KEY) or WANDB_MODE=offline.

    Args:
        config: `logger.*`; the other options are shown in Weights & Biases.
        folder: of the run.
    """
    from openrlhf_bd.upstream import TensorboardLogger, WandbLogger

    arguments = _arguments(config, folder)
    loggers: list[Any] = [TensorboardLogger(arguments)]
    key = config.logger.wandb.key
    if key or "WANDB_API_KEY" in os.environ or os.environ.get("WANDB_MODE") == "offline":
        # What the logger is given is kept, and so is the command line: the key takes another way.
        found = {"WANDB_API_KEY": key} if key else {}
        variables = {"WANDB_RUN_ID": _wandb_id(folder), "WANDB_RESUME": "allow"} | found
        with _environment(variables), _command_line_without(key):
            loggers.append(WandbLogger(arguments))
    return loggers


def log_evaluation(config: Config, folder: Path, evaluation: Evaluation, *, step: int) -> None:
    """Give the loggers the final scores: `eval/test/<test set>/<score>`, means over seeds.

    Args:
        config: of the run.
        folder: of the run.
        evaluation: of its student.
        step: optimizer step of this student.
    """
    values = {
        f"test/{_NOT_IN_NAMES.sub('_', dataset)}/{score.name}": fmean(found)
        for dataset, scores in evaluation.datasets.items()
        for score in SCORES
        if (found := score.stored(scores))
    }
    for logger in open_loggers(config, folder):
        logger.log_eval(step, values)
        logger.close()


def _arguments(config: Config, folder: Path) -> SimpleNamespace:
    """What OpenRLHF's loggers read, beside all other options."""
    own = config.logger
    wandb = own.wandb.model_dump() | {"run_name": own.wandb.run_name or folder.name, "key": None}
    tensorboard_dir = own.tensorboard_dir or str(folder / "tensorboard")
    options = config.model_dump(mode="json")
    logger = options["logger"] | {"tensorboard_dir": tensorboard_dir, "wandb": _Options(wandb)}
    return SimpleNamespace(**(options | {"logger": _Options(logger)}))


def _wandb_id(folder: Path) -> str:
    """Name of the run in Weights & Biases: the user's (WANDB_RUN_ID), or the one that the folder keeps."""
    if given := os.environ.get("WANDB_RUN_ID"):
        return given
    path = folder / WANDB_ID_FILE
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()


@contextmanager
def _command_line_without(key: str | None) -> Iterator[None]:
    """For the length of the block `sys.argv` does not show the key."""
    given = sys.argv
    if key:
        sys.argv = [word.replace(key, "***") for word in given]
    try:
        yield
    finally:
        sys.argv = given


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the length of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
