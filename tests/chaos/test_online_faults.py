"""Online runs whose driver or engines are killed: nothing is lost, nothing is used twice, and versions stay true."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from openrlhf_bd.store import StoreReader
from tests.integration.tiny_job import JOB_TIMEOUT_S, job_flags, run_job, write_inputs

pytestmark = pytest.mark.chaos

BATCH, STEPS = 12, 8


def flags(inputs: Path, run: Path, **changes: str) -> list[str]:
    online = {
        "algo__distill__mode": "online",
        "train__batch_size": str(BATCH),
        "train__max_steps": str(STEPS),
        "train__max_epochs": "2",
        "ckpt__save_steps": "2",
        "eval__dataset": "",
        "eval__steps": "",
        "eval__test_datasets": "",
    }
    return job_flags(inputs, run, **(online | changes))


def steps_of(run: Path) -> dict[int, dict[str, float]]:
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["step"]: record for record in map(json.loads, lines)}


def shards_of(run: Path) -> dict[str, str]:
    """Name and hash of every sealed shard."""
    folder = run / "rollouts"
    # The last line may be cut short: then its shard does not count.
    lines = (folder / "shards.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    names = [json.loads(line)["shard"]["file"] for line in lines if line.endswith("\n")]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    command = [sys.executable, "-m", "openrlhf_bd.cli.train_bd_ray", *arguments]
    return subprocess.Popen(command, env=environment | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def wait_until(job: subprocess.Popen[bytes], happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while not happened():
        assert job.poll() is None, f"the job ended by itself with {job.returncode}"
        assert time.monotonic() < deadline, f"{what} did not happen in {JOB_TIMEOUT_S:.0f} s"
        time.sleep(0.05)


def actors_of(job: subprocess.Popen[bytes], name: str) -> list[psutil.Process]:
    """Processes of a job's actors of a class."""
    children = psutil.Process(job.pid).children(recursive=True)
    return [child for child in children if child.is_running() and name in " ".join(child.cmdline())]


def require_whole(inputs: Path, run: Path) -> None:
    """Every planned row once, and an offline run over them in their order repeats every loss to the last bit."""
    reader = StoreReader(run / "rollouts")
    assert len(reader) == len(set(reader.row_ids)) == BATCH * STEPS
    first_epoch = {row_id for row_id, step in zip(reader.row_ids, reader.steps, strict=True) if step <= 4}
    assert first_epoch == {f"{prompt:08d}:{sample}" for prompt in range(24) for sample in range(2)}
    for row in reader.rollouts(range(len(reader))):
        assert row.origin is not None
        if row.origin.source == "student":
            assert row.origin.policy_version is not None
            assert 0 <= row.origin.step - 1 - row.origin.policy_version <= 1
    again = run.with_name(f"{run.name}-again")
    offline = {"algo__distill__mode": "offline", "train__row_order": "recorded"}
    done = run_job(*flags(inputs, again, teacher__store_path=str(run / "rollouts"), **offline))
    assert done.returncode == 0, done.stdout
    expected, found = steps_of(again), steps_of(run)
    assert list(found) == list(range(1, STEPS + 1))
    for step, record in expected.items():
        assert found[step]["train/loss"] == record["train/loss"]
        assert found[step]["train/actor_grad_norm"] == record["train/actor_grad_norm"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def test_killed_online_run_goes_on_from_its_rows(inputs: Path) -> None:
    """kill -9 of the driver after step 3: the checkpoint of step 2 and the sealed rows give the run that was begun."""
    run = inputs / "driver-killed"
    with start(flags(inputs, run)) as job:
        wait_until(job, lambda: 3 in steps_of(run), "step 3")
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    before, losses = shards_of(run), steps_of(run)
    assert len(before) >= 3
    done = run_job(*flags(inputs, run))
    assert done.returncode == 0, done.stdout
    after = shards_of(run)
    assert {name: after[name] for name in before} == before
    # Step 3 was done again, from the same rows.
    assert steps_of(run)[3]["train/loss"] == losses[3]["train/loss"]
    require_whole(inputs, run)


@pytest.mark.parametrize("actor", ["StudentSampler", "TeacherEngine"])
def test_engine_killed_while_the_student_trains(inputs: Path, actor: str) -> None:
    """kill -9 of an engine after step 2: another takes its place, with the newest weights, and no row is missing."""
    run = inputs / f"{actor}-killed"
    with start(flags(inputs, run)) as job:
        wait_until(job, lambda: 2 in steps_of(run), "step 2")
        [victim] = actors_of(job, actor)
        victim.kill()
        victim.wait(60)
        wait_until(job, lambda: STEPS in steps_of(run), "the last step")
        assert job.wait(JOB_TIMEOUT_S) == 0
    assert not victim.is_running()
    require_whole(inputs, run)


def test_teacher_killed_while_its_tokens_are_mixed_in(inputs: Path) -> None:
    """kill -9 of the teacher's only engine: it is replaced, not the students' engines that asked it for tokens."""
    run = inputs / "mixing-teacher-killed"
    with start(flags(inputs, run, algo__distill__teacher_mix="0.3", algo__distill__rollout="student")) as job:
        wait_until(job, lambda: 2 in steps_of(run), "step 2")
        [victim], [student] = actors_of(job, "TeacherEngine"), actors_of(job, "StudentSampler")
        victim.kill()
        victim.wait(60)
        wait_until(job, lambda: STEPS in steps_of(run), "the last step")
        assert student.is_running()
        assert job.wait(JOB_TIMEOUT_S) == 0
    assert not victim.is_running()
    require_whole(inputs, run)
