"""Calls of actors: waits that end, and Ray's errors as ours.

An actor's own error, where it is one of ours, reaches the caller as it was raised. What else ends a call is the loss of
the actor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from openrlhf_bd.errors import BDError, ClusterError

# An engine's threads for calls that must be answered while others wait for responses: about weights, signs of life.
CONTROL = "control"
CONTROL_CALLS = 4


class EngineLostError(Exception):
    """An engine died, hung or failed, and another may take its place; the message says how.

    Attributes:
        of_another: it is not the engine that was asked, but one from which that one wanted something.
    """

    def __init__(self, message: str, *, of_another: bool = False) -> None:
        super().__init__(message)
        self.of_another = of_another


def control(method: Any) -> Any:
    """A method of an engine's actor, as it is called on the threads for control."""
    return method.options(concurrency_group=CONTROL)


def wait_for(refs: Any, *, timeout_s: float, what: str) -> Any:
    """Results of remote calls, or an error that says what was waited for.

    Raises:
        BDError: what the actor raised, if it is one of ours.
        ClusterError: no answer in time, or an actor died.
    """
    try:
        return ray.get(refs, timeout=timeout_s)
    except GetTimeoutError:
        raise ClusterError(
            f"no answer within {timeout_s:.0f} s while waiting for {what}; see --cluster.* for the limits. "
            "Run the same command again to resume"
        ) from None
    except RayTaskError as error:
        if isinstance(error.cause, BDError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise ClusterError(
            f"an actor died while waiting for {what}: {error}. Run the same command again to resume"
        ) from error
    except OutOfMemoryError as error:
        raise ClusterError(
            f"a node ran out of memory while waiting for {what}, and Ray ended an actor there: {_first_line(error)}. "
            "Run the same command again to resume, with fewer actors a node or more memory"
        ) from error


def engine_result(ref: Any, *, losses: tuple[type[BDError], ...] = ()) -> Any:
    """The result of an engine's call that has ended.

    Args:
        ref: of the call.
        losses: errors of ours after which the engine is of no use either.

    Raises:
        EngineLostError: the engine died or failed, or its machine went away with the result.
        BDError: what the engine raised, if it is another one of ours.
    """
    try:
        return ray.get(ref)
    except RayTaskError as error:
        # First: one whose cause is an actor's death, of another actor than this one, is a RayActorError too.
        if isinstance(error.cause, BDError) and not isinstance(error.cause, losses):
            raise error.cause from None
        message = f"it failed: {type(error.cause).__name__}: {_first_line(error.cause)}"
        raise EngineLostError(message, of_another=isinstance(error.cause, RayActorError)) from error
    except RayActorError as error:
        raise EngineLostError(f"it died: {_first_line(error)}") from error
    except RayError as error:
        raise EngineLostError(f"its result was lost: {_first_line(error)}") from error


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
