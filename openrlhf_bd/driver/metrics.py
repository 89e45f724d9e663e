"""Metrics of a run: JSON lines in the run folder, and OpenRLHF's TensorBoard and Weights & Biases loggers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openrlhf_bd.config import Config
from openrlhf_bd.store.files import write_text

METRICS_FILE = "metrics.jsonl"


def truncate_metrics(path: Path, *, after_step: int) -> None:
    """Drop the records of steps that a resumed run will do again, so that each step stands there once."""
    if not path.exists():
        return
    kept = [
        line
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip() and json.loads(line)["step"] <= after_step
    ]
    write_text(path, "".join(f"{line}\n" for line in kept))


class MetricsLog:
    """Writes one record a step. Names are OpenRLHF's: `train/...` while training, `eval/...` for validation."""

    def __init__(self, config: Config, folder: Path) -> None:
        from openrlhf_bd.upstream import TensorboardLogger, WandbLogger

        self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")
        run_name = config.logger.wandb.run_name or folder.name
        wandb = SimpleNamespace(**{**config.logger.wandb.model_dump(), "run_name": run_name})
        tensorboard_dir = config.logger.tensorboard_dir or str(folder / "tensorboard")
        arguments = SimpleNamespace(logger=SimpleNamespace(tensorboard_dir=tensorboard_dir, wandb=wandb))
        self._loggers: list[Any] = [TensorboardLogger(arguments)]
        if config.logger.wandb.key or "WANDB_API_KEY" in os.environ:
            self._loggers.append(WandbLogger(arguments))

    def train(self, step: int, epoch: float, values: dict[str, float]) -> None:
        self._write(step, "train", values, epoch=epoch)
        for logger in self._loggers:
            logger.log_train(step, values)

    def validation(self, step: int, epoch: float, values: dict[str, float]) -> None:
        self._write(step, "eval", values, epoch=epoch)
        for logger in self._loggers:
            logger.log_eval(step, values)

    def _write(self, step: int, prefix: str, values: dict[str, float], *, epoch: float) -> None:
        record = {"step": step, "epoch": round(epoch, 6), "time_s": round(time.time(), 3)}
        record |= {f"{prefix}/{name}": value for name, value in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        for logger in self._loggers:
            logger.close()
