"""Fixtures of the tests that start the student's ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
import ray
from student_runs import Material, write_material

from openrlhf_bd.student.actor import StudentRank
from openrlhf_bd.upstream import RayActorGroup


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def student_cluster() -> Iterator[None]:
    # Not pytest's folder: Ray makes sockets there, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(
            address="local",
            num_cpus=16,
            num_gpus=8,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def two_ranks(student_cluster: None) -> RayActorGroup:
    return RayActorGroup(1, 2, StudentRank)


@pytest.fixture(scope="module")
def two_other_ranks(student_cluster: None) -> RayActorGroup:
    """Processes that know nothing of what the first two did."""
    return RayActorGroup(1, 2, StudentRank)


@pytest.fixture(scope="module")
def one_rank(student_cluster: None) -> RayActorGroup:
    return RayActorGroup(1, 1, StudentRank)
