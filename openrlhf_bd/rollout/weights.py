"""The student's weights from its ranks to its engines, as the driver sees it: one call for each version.

The ranks send, rank 0 and the engines talk to each other, and the driver begins and ends: so no engine generates with
weights of two versions, and whoever fails or hangs is named.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayError

from openrlhf_bd.engines.arguments import Transfer
from openrlhf_bd.engines.loop import InFlight
from openrlhf_bd.errors import ClusterError
from openrlhf_bd.rollout.calls import answers, control

# Of a call that an engine answers at once if it answers at all.
CONTROL_TIMEOUT_S = 10.0


class Ranks(Protocol):
    """The student's ranks, as OpenRLHF's RayActorGroup has them."""

    def async_run_method(self, method_name: str, *args: Any, **kwargs: Any) -> list[Any]: ...


class EngineSync(ABC):
    """Brings a student from its ranks to its engines.

    Args:
        ranks: of the student, with their model.
        engines: actor handles of `RolloutEngine`.
        in_flight: what becomes of responses under way when weights come, see `RolloutEngine.begin_update`.
        timeout_s: longest wait for each part of an update.
    """

    def __init__(self, ranks: Ranks, engines: Sequence[Any], *, in_flight: InFlight, timeout_s: float) -> None:
        self._ranks, self._engines = ranks, list(engines)
        self._in_flight, self._timeout_s = in_flight, timeout_s

    @abstractmethod
    def sync(self, version: int, *, average: bool = False) -> dict[str, float]:
        """Bring the student as it is now to all engines; when it returns, what they begin is begun with it.

        Args:
            version: optimizer steps behind the weights.
            average: its running average (--train.enable_ema) instead, under the same version.

        Returns:
            Seconds: "sync_pause_s" until the engines stood still, "sync_gather_s" putting parameters together,
            "sync_transfer_s" on the way, "sync_load_s" and "sync_reset_s" in the engines, "sync_s" in all; of several
            engines or ranks the largest. "sync_bytes"; "sync_restarted": responses that begin anew.

        Raises:
            ClusterError: a rank or an engine did not do its part. Engines that have part of the new weights refuse to
                generate; they take part in a new group.
        """

    def _of_engines(self, method: str, what: str, *arguments: Any, **options: Any) -> list[Any]:
        refs = [control(getattr(engine, method)).remote(*arguments, **options) for engine in self._engines]
        return answers(refs, who="engine", what=what, timeout_s=self._timeout_s + CONTROL_TIMEOUT_S)

    def _of_ranks(self, refs: Sequence[Any], what: str) -> list[Any]:
        try:
            return answers(refs, who="rank", what=what, timeout_s=self._timeout_s + CONTROL_TIMEOUT_S)
        except ClusterError as error:
            silent = self._silent_engines()
            if not silent:
                raise
            raise ClusterError(f"{error}. Engine {', '.join(silent)} does not answer") from error

    def _silent_engines(self) -> list[str]:
        """Places of the engines that hang or are dead."""
        silent = []
        refs = [control(engine.progress).remote() for engine in self._engines]
        for place, ref in enumerate(refs):
            try:
                ray.get(ref, timeout=CONTROL_TIMEOUT_S)
            except (GetTimeoutError, RayError):
                silent.append(str(place))
        return silent


class WeightSync(EngineSync):
    """All weights travel, in a group of ranks and engines. Make another one when an engine was replaced or an update
    failed.

    Args:
        ranks: of the student, with their model.
        engines: actor handles of `RolloutEngine`.
        transfer: how weights travel.
        workers_per_engine: GPUs of an engine.
        in_flight: see `EngineSync`.
        timeout_s: see `EngineSync`.

    Raises:
        ConfigError: an engine hosts another architecture.
        ClusterError: the group did not come together.
    """

    def __init__(
        self,
        ranks: Ranks,
        engines: Sequence[Any],
        *,
        transfer: Transfer,
        workers_per_engine: int = 1,
        in_flight: InFlight,
        timeout_s: float,
    ) -> None:
        super().__init__(ranks, engines, in_flight=in_flight, timeout_s=timeout_s)
        refs = ranks.async_run_method(
            "join_weight_group", self._engines, transfer=transfer, workers_per_engine=workers_per_engine
        )
        self._of_ranks(refs, "join the group for weights")

    def sync(self, version: int, *, average: bool = False) -> dict[str, float]:
        started = time.monotonic()
        try:
            begun = self._of_engines(
                "begin_update", "stop for new weights", version, in_flight=self._in_flight, timeout_s=self._timeout_s
            )
            sent = self._of_ranks(self._ranks.async_run_method("send_weights", average=average), "send weights")
            ended = self._of_engines("finish_update", "load weights and reset its cache", version)
        except BaseException as error:
            self._abandon(f"the update ended with {error}")
            raise
        return {
            "sync_pause_s": _largest(begun, "pause_s"),
            "sync_gather_s": _largest(sent, "gather_s"),
            "sync_transfer_s": sent[0]["transfer_s"],
            "sync_load_s": _largest(ended, "load_s"),
            "sync_reset_s": _largest(ended, "reset_s"),
            "sync_s": time.monotonic() - started,
            "sync_bytes": sent[0]["bytes"],
            "sync_restarted": sum(part["restarted"] for part in begun),
        }

    def _abandon(self, reason: str) -> None:
        refs = [control(engine.abandon_update).remote(reason) for engine in self._engines]
        for ref in refs:
            # Whoever does not answer is dead or hangs, and generates nothing.
            with contextlib.suppress(GetTimeoutError, RayError):
                ray.get(ref, timeout=CONTROL_TIMEOUT_S)


class AdapterSync(EngineSync):
    """The adapters of a LoRA student travel as files; nothing stands still for them.

    Args:
        ranks: of the student.
        engines: actor handles of `RolloutEngine`, with room for adapters.
        folder: for adapters, on a file system that ranks and engines share. An adapter is removed when no response
            needs it.
        in_flight: "abort" lets responses under way begin anew; otherwise they finish with their own adapter.
        timeout_s: longest wait for each part.
    """

    def __init__(
        self, ranks: Ranks, engines: Sequence[Any], *, folder: Path, in_flight: InFlight, timeout_s: float
    ) -> None:
        super().__init__(ranks, engines, in_flight=in_flight, timeout_s=timeout_s)
        self._folder = folder

    def sync(self, version: int, *, average: bool = False) -> dict[str, float]:
        started = time.monotonic()
        name = f"{'average' if average else 'student'}-v{version}"
        target = self._folder / name
        if target.exists():
            shutil.rmtree(target)
        refs = self._ranks.async_run_method("save_adapter", str(target), average=average)
        num_bytes = sum(self._of_ranks(refs, "save its adapters"))
        saved = time.monotonic()
        loaded = self._of_engines(
            "load_adapter", "load an adapter", name, str(target), version, in_flight=self._in_flight
        )
        needed = {name for part in loaded for name in part["needed"]}
        for old in self._folder.iterdir():
            if old.name not in needed:
                shutil.rmtree(old)
        return {
            "sync_pause_s": 0.0,
            "sync_gather_s": saved - started,
            "sync_transfer_s": 0.0,
            "sync_load_s": _largest(loaded, "load_s"),
            "sync_reset_s": 0.0,
            "sync_s": time.monotonic() - started,
            "sync_bytes": num_bytes,
            "sync_restarted": sum(part["restarted"] for part in loaded),
        }


def _largest(parts: Sequence[Mapping[str, float]], name: str) -> float:
    return max(part[name] for part in parts)
