"""Waits that end, against a real Ray session."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import ray

from openrlhf_bd.driver.cluster import cluster_device, placed
from openrlhf_bd.errors import ClusterError, DataError
from openrlhf_bd.rollout.calls import wait_for

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote(max_retries=0)
def sleep(seconds: float) -> None:
    time.sleep(seconds)


@ray.remote(max_retries=0)
def fail() -> None:
    raise DataError("train.jsonl:3: no instruction")


@ray.remote
class Mortal:
    def die(self) -> None:
        os._exit(1)


def test_wait_says_what_it_waited_for() -> None:
    """An answer that does not come in time is an error that names what was waited for and how long."""
    with pytest.raises(ClusterError, match=r"within 0\.?1? s|within 0 s") as caught:
        wait_for(sleep.remote(30), timeout_s=0.1, what="the moon to rise")
    assert "the moon to rise" in str(caught.value)


def test_own_errors_come_out_as_they_are() -> None:
    """An error that we raised in an actor reaches the driver as itself, without Ray's traceback in its message."""
    with pytest.raises(DataError) as caught:
        wait_for(fail.remote(), timeout_s=60, what="x")
    assert str(caught.value) == "train.jsonl:3: no instruction"


def test_dead_actor_is_an_error_of_the_cluster() -> None:
    """An actor that dies ends the wait with a resumable error."""
    with pytest.raises(ClusterError, match="died while waiting for the engine") as caught:
        wait_for(Mortal.remote().die.remote(), timeout_s=60, what="the engine")
    assert caught.value.exit_status == 75


def test_no_room_ends_the_wait() -> None:
    """Resources that the cluster does not have free end the wait, with what was asked for and what is free."""
    with pytest.raises(ClusterError, match="no room for ranks"), placed([{"CPU": 64.0}], timeout_s=1, what="ranks"):
        pass


def test_machine_without_accelerators_is_a_cpu_cluster() -> None:
    """Logical GPUs do not make a GPU machine."""
    assert cluster_device() == "cpu"
