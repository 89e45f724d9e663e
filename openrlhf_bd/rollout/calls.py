"""Calls of several actors at once, with one limit of time and the place of whoever does not answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from openrlhf_bd.errors import BDError, ClusterError

# An engine's threads for calls that must be answered while others wait for responses: about weights, signs of life.
CONTROL = "control"
CONTROL_CALLS = 4


def control(method: Any) -> Any:
    """A method of an engine's actor, as it is called on the threads for control."""
    return method.options(concurrency_group=CONTROL)


def answers(refs: Sequence[Any], *, who: str, what: str, timeout_s: float) -> list[Any]:
    """What actors answer, one call each.

    Args:
        refs: of the calls, by the actors' places.
        who: the actors are, as "engine".
        what: they were asked to do, as "load weights".
        timeout_s: longest wait for all of them.

    Raises:
        BDError: what an actor raised, if it is one of ours, with its place.
        ClusterError: one died, or did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    found = []
    for place, ref in enumerate(refs):
        name = f"{who} {place} of {len(refs)}"
        try:
            found.append(ray.get(ref, timeout=max(0.0, deadline - time.monotonic())))
        except GetTimeoutError:
            raise ClusterError(f"{name} did not {what} within {timeout_s:.0f} s (--cluster.sync_timeout_s)") from None
        except RayActorError as error:
            raise ClusterError(f"{name} died when it was to {what}: {error}") from error
        except RayTaskError as error:
            if isinstance(error.cause, BDError):
                raise type(error.cause)(f"{name} did not {what}: {error.cause}") from None
            raise
    return found
