"""The command that makes the teacher's data meets a rival, is killed, finds a full disk; the same command goes on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from openrlhf_bd.store import StoreReader, verify_store
from tests.integration.tiny_job import JOB_TIMEOUT_S, job_environment, job_flags, run_job, write_inputs
from tests.small_disk import NAMESPACE, can_mount

pytestmark = pytest.mark.chaos

GENERATE = "openrlhf_bd.cli.generate_teacher"
# Ray's own agents, without an engine or memory to speak of: they look for their node for a minute after it has gone.
AGENTS = ("ray::DashboardAg", "ray::RuntimeEnvA")
OTHER_FILES = (".lock", "manifest.json", "shards.jsonl", "job.yaml")
ALL_ROWS = sorted(f"{prompt:08d}:{sample}" for prompt in range(24) for sample in range(2))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def generate_flags(inputs: Path, run: Path, store: Path) -> list[str]:
    """48 rows in eight shards, by batches of three."""
    return job_flags(
        inputs, run, teacher__store_path=str(store), teacher__rows_per_shard="6", teacher__max_num_seqs="2"
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sealed_shards(store: Path) -> dict[str, bytes]:
    """Bytes of each shard that the journal lists."""
    path = store / "shards.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    files = [json.loads(line)["shard"]["file"] for line in lines]
    return {file: (store / file).read_bytes() for file in files}


def require_whole(store: Path, sealed_before: dict[str, bytes]) -> None:
    """Every row once, shards as they were sealed, and nothing in the folder that does not belong there."""
    reader = StoreReader(store)
    verify_store(reader.path)
    assert sorted(reader.row_ids) == ALL_ROWS
    shards = sealed_shards(store)
    assert sealed_before.items() <= shards.items()
    assert {path.name for path in store.iterdir()} == {*OTHER_FILES, *shards}


@contextmanager
def stopped_in_mid_generation(arguments: list[str], store: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process that stands still from its first sealed shard on; it is killed at the end."""
    command = [sys.executable, "-m", GENERATE, *arguments]
    with subprocess.Popen(command, env=job_environment(), start_new_session=True) as job:
        try:
            deadline = time.monotonic() + JOB_TIMEOUT_S
            while not sealed_shards(store):
                assert job.poll() is None, f"the job ended by itself with {job.returncode}"
                assert time.monotonic() < deadline, f"no shard was sealed in {JOB_TIMEOUT_S:.0f} s"
                time.sleep(0.01)
            os.kill(job.pid, signal.SIGSTOP)
            yield job
        finally:
            job.kill()


def test_rivals_and_a_killed_driver(inputs: Path, tmp_path: Path) -> None:
    """A second writer is refused at once; kill -9 of the first in mid-generation; the same command then ends whole."""
    store, run = tmp_path / "store", tmp_path / "run"
    arguments = generate_flags(inputs, run, store)
    with stopped_in_mid_generation(arguments, store) as job:
        sealed, before = sealed_shards(store), contents(store)
        assert 0 < len(sealed) < 8
        processes = psutil.Process(job.pid).children(recursive=True)
        assert any("TeacherEngine" in process.name() for process in processes)

        same_command = run_job(*arguments, module=GENERATE)
        assert same_command.returncode == 2, same_command.stdout
        assert f"{run}: process {job.pid} is writing to this folder" in same_command.stdout
        other_run = run_job(*generate_flags(inputs, tmp_path / "other", store), module=GENERATE)
        assert other_run.returncode == 2, other_run.stdout
        assert f"{store}: process {job.pid} on " in other_run.stdout
        assert "starting" not in same_command.stdout + other_run.stdout
        assert contents(store) == before
        assert not (tmp_path / "other").exists()

        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    # Nobody waits for the dead job's processes.
    resumed = run_job(*arguments, module=GENERATE)
    assert resumed.returncode == 0, resumed.stdout
    require_whole(store, sealed)
    left_over = [process.name() for process in processes if is_running(process)]
    assert all(name.startswith(AGENTS) for name in left_over), left_over


def is_running(process: psutil.Process) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_full_disk(inputs: Path, tmp_path: Path) -> None:
    """A disk of eight pages: status 74, with file and remedy; sealed rows stay. With room the same command ends whole.

    The lock, the manifest, the options and the journal take a page each, a shard two: the third does not fit.
    """
    if not can_mount():
        pytest.skip("this machine lets nobody mount file systems of his own (unshare --user --mount)")
    store = tmp_path / "store"
    store.mkdir()
    command = shlex.join([sys.executable, "-m", GENERATE, *generate_flags(inputs, tmp_path / "run", store)])
    script = f"""
        mount -t tmpfs -o size={8 * 4096} tmpfs {store}
        {command} > {tmp_path}/first.log 2>&1; echo $? > {tmp_path}/first.status; cp -r {store} {tmp_path}/first
        mount -o remount,size=16m {store}
        {command} > {tmp_path}/second.log 2>&1; echo $? > {tmp_path}/second.status; cp -r {store} {tmp_path}/second
    """
    subprocess.run([*NAMESPACE, "sh", "-c", script], env=job_environment(), timeout=JOB_TIMEOUT_S, check=True)

    output = (tmp_path / "first.log").read_text(encoding="utf-8")
    assert (tmp_path / "first.status").read_text() == "74\n", output
    assert f"{store}/" in output
    assert "No space left on device" in output
    assert "make room (or mend the disk) and run the same command again to continue" in output
    assert "Traceback" not in output
    sealed = sealed_shards(tmp_path / "first")
    assert 0 < len(sealed) < 8
    assert not list((tmp_path / "first").glob("*.tmp"))
    assert (tmp_path / "second.status").read_text() == "0\n", (tmp_path / "second.log").read_text(encoding="utf-8")
    require_whole(tmp_path / "second", sealed)
