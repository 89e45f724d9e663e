"""Signs of life of an engine that is at work: a hung one is told from a slow one by its steps."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayError

from openrlhf_bd.rollout.calls import control

# Asked no more often than this; a longer time between two looks is the driver's own absence.
INTERVAL_S = 1.0
ABSENCE_S = 5.0


class Pulse:
    """Asks an engine again and again how far it is, without waiting for the answer.

    Args:
        handle: actor of a `GenerationEngine`.
    """

    def __init__(self, handle: Any) -> None:
        self._handle, self._asked = handle, None
        self._num_steps = -1
        self._alive_at = self._looked_at = self._asked_at = time.monotonic()

    def rest(self) -> None:
        """The engine has nothing to do, and need not make steps."""
        self._alive_at = self._looked_at = time.monotonic()

    def silence_s(self) -> float:
        """Time since the engine was seen to make a step, or to have nothing to do, seconds."""
        now = time.monotonic()
        if now - self._looked_at > ABSENCE_S:
            self._alive_at += now - self._looked_at
        self._looked_at = now
        if self._asked is None:
            if now - self._asked_at > INTERVAL_S:
                self._asked, self._asked_at = control(self._handle.progress).remote(), now
        elif ray.wait([self._asked], timeout=0)[0]:
            self._note(self._asked)
            self._asked = None
        return time.monotonic() - self._alive_at

    def _note(self, answer: Any) -> None:
        try:
            progress = ray.get(answer)
        except RayError:
            # Its calls fail too, and say why.
            return
        if progress.num_steps != self._num_steps or progress.num_running == 0:
            self._num_steps, self._alive_at = progress.num_steps, time.monotonic()
