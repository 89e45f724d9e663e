"""Metrics of a run: JSON lines in the run folder, and OpenRLHF's TensorBoard and Weights & Biases loggers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from openrlhf_bd.config import Config
from openrlhf_bd.driver.loggers import open_loggers
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


def wall_clock_rates(metrics: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Tokens a second and model FLOP utilisation by the clock on the wall.

    The ranks' own rates are over what they spend computing; these also have data, communication with the driver and
    logging in them.

    Args:
        metrics: of one training step.
        seconds: from the end of the step before to the end of this one.
    """
    compute_s = metrics["time_forward_backward_s"] + metrics["time_optimizer_s"]
    share = compute_s / seconds
    return {"tokens_per_s_wall": metrics["tokens_per_s"] * share, "mfu_wall": metrics["mfu"] * share}


class Stopwatch:
    """Wall clock from one step to the next, without what does not belong to training."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, clock()

    def lap(self) -> float:
        """Seconds since the last lap, pauses left out."""
        now = self._clock()
        seconds, self._started = now - self._started, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        paused = self._clock()
        yield
        self._started += self._clock() - paused


class MetricsLog:
    """Writes one record a step. Names are OpenRLHF's: `train/...` while training, `eval/...` for validation."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")
        self._loggers = open_loggers(config, folder)

    def train(self, step: int, epoch: float, values: dict[str, float]) -> None:
        self._write(step, "train", values, epoch=epoch)
        for logger in self._loggers:
            logger.log_train(step, values)

    def validation(self, step: int, epoch: float, values: dict[str, float]) -> None:
        self._write(step, "eval", values, epoch=epoch)
        for logger in self._loggers:
            # The x axis of these charts in Weights & Biases, as OpenRLHF's logger defines them.
            logger.log_eval(step, {"epoch": epoch, **values})

    def _write(self, step: int, prefix: str, values: dict[str, float], *, epoch: float) -> None:
        record = {"step": step, "epoch": round(epoch, 6), "time_s": round(time.time(), 3)}
        record |= {f"{prefix}/{name}": value for name, value in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        for logger in self._loggers:
            logger.close()
