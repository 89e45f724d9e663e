"""Ray: the session, resources and placement.

Every wait has a timeout that says what it waits for. Actors are never restarted or retried by Ray (a repeated call
would repeat its side effects); the driver resumes from what is on disk.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import ray
import torch
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from openrlhf_bd.errors import ClusterError


def cluster_device() -> Literal["cpu", "cuda"]:
    """What the cluster's GPUs are: real ones, or on machines without any only numbers, and everything runs on CPUs."""
    names = ray.cluster_resources()
    return "cuda" if any(name.startswith("accelerator_type:") for name in names) else "cpu"


@contextmanager
def ray_session(*, num_gpus: int) -> Iterator[dict[str, float]]:
    """A Ray session for the length of the block: the cluster of RAY_ADDRESS (jobs have it), or a local one.

    On a machine without GPUs the local session's GPUs are only numbers, as many as the job needs, so that the same
    placement serves CPUs and GPUs.

    Args:
        num_gpus: GPUs of the job's largest stage.

    Yields:
        The cluster's resources.
    """
    started_here = False
    if not ray.is_initialized():
        # Ray's coming behaviour, and no warning about it: actors without GPUs keep their visible devices.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        else:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, num_gpus + 2),
                num_gpus=None if torch.cuda.is_available() else num_gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        started_here = True
    try:
        yield ray.cluster_resources()
    finally:
        if started_here:
            ray.shutdown()


@contextmanager
def placed(bundles: Sequence[dict[str, float]], *, timeout_s: float, what: str) -> Iterator[PlacementGroup]:
    """Resources for a group of actors, given back at the end of the block.

    Raises:
        ClusterError: the resources were not free within the timeout.
    """
    group = placement_group(list(bundles), strategy="PACK")
    try:
        try:
            ray.get(group.ready(), timeout=timeout_s)
        except GetTimeoutError:
            raise ClusterError(
                f"no room for {what} within {timeout_s:.0f} s: asked for {list(bundles)}, free now: "
                f"{ray.available_resources()}. Other jobs may hold the cluster; run the same command again to resume"
            ) from None
        yield group
    finally:
        remove_placement_group(group)
