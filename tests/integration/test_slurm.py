"""launch/slurm.sh on two "nodes" of one machine: Slurm's commands are stand-ins, Ray and the job are real."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray_cluster import free_ports
from slurm_commands import SILENT_NODE, write_commands

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch" / "slurm.sh"
JOBS = Path(__file__).parent / "jobs"
TIMEOUT_S = 240.0
END_S = 10.0
NODE_OPTIONS = f"--num-cpus 4 --num-gpus 1 --object-store-memory {100 * 1024**2}"

Job = dict[str, str]


@pytest.fixture
def job() -> Iterator[Job]:
    """Environment of a Slurm job with two nodes."""
    # A short path: Ray puts Unix sockets below it, whose names may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="bd-", dir="/tmp"))
    write_commands(folder)
    ray_port, dashboard_port = free_ports(2)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_", "SLURM_"))}
    yield env | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": folder.name,
        "SLURM_JOB_NODELIST": "node0,node1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "HEAD_IP": "127.0.0.1",
        "RAY_PORT": str(ray_port),
        "DASHBOARD_PORT": str(dashboard_port),
        "NODE_OPTIONS": NODE_OPTIONS,
        "LOGS": str(folder / "logs"),
        "PYTHON": sys.executable,
    }
    shutil.rmtree(folder)
    shutil.rmtree(f"/tmp/ray-{folder.name}", ignore_errors=True)


def slurm(job: Job, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs the batch script. Its output, stderr included, is in `stdout`."""
    return subprocess.run(
        [SLURM, *command],
        env=job,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def left_over(job: Job) -> list[str]:
    """Command lines that still run with this job's id in their environment; Ray's workers follow their node at once."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_JOB_ID") == job["SLURM_JOB_ID"]:
                found.append(process)
    lines = []
    for process in psutil.wait_procs(found, timeout=END_S)[1]:
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    return lines


def ray_job(working_dir: Path, *command: str) -> list[str]:
    return [f"{ROOT}/launch/ray_job.sh", "--working-dir", str(working_dir), "--", sys.executable, *command]


@pytest.mark.integration
def test_a_job_uses_all_nodes_of_the_allocation(job: Job) -> None:
    """Head and worker start with a token of the job's own, the command reaches both, and nothing is left."""
    done = slurm(job, *ray_job(JOBS, "actor_on_each_node.py", "2"))
    assert done.returncode == 0, done.stdout
    assert "one actor on each of 2 nodes" in done.stdout
    token = Path(job["LOGS"], "auth_token")
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text(encoding="utf-8")) == 64
    assert left_over(job) == []


@pytest.mark.integration
def test_exit_status_is_that_of_the_command(job: Job) -> None:
    """One node alone is a cluster, too, and the batch script ends with the status of the job's driver."""
    done = slurm(job | {"SLURM_JOB_NODELIST": "node0"}, *ray_job(JOBS, "-c", "raise SystemExit(75)"))
    assert done.returncode == 75, done.stdout
    assert left_over(job) == []


@pytest.mark.integration
def test_a_node_that_does_not_come_is_named(job: Job) -> None:
    """Nodes that are missing when the time is over end the script with 75 and their names; no command runs."""
    done = slurm(job | {"SLURM_JOB_NODELIST": f"node0,{SILENT_NODE}", "WAIT_S": "20"}, "touch", f"{job['LOGS']}/ran")
    assert done.returncode == 75, done.stdout
    assert f"1 of 2 nodes are there after 20 s; missing: {SILENT_NODE}" in done.stdout
    assert not Path(job["LOGS"], "ran").exists()
    assert left_over(job) == []


@pytest.mark.integration
def test_cancelled_job_ends_everything(job: Job) -> None:
    """SIGTERM, as before the time limit, ends the script with 143, and the nodes and the command with it."""
    script = [SLURM, *ray_job(JOBS, "-uc", "import time; print('job runs'); time.sleep(600)")]
    with subprocess.Popen(script, env=job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            output.append(line)
            if line.strip() == "job runs":
                break
        else:
            pytest.fail("".join(output))
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(60) == 143
        assert time.monotonic() - started < 45
    assert left_over(job) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_JOB_NODELIST": ""}, "not in a Slurm job"),
        ({"SLURM_SUBMIT_DIR": "/tmp"}, "no launch/ray_node.sh here"),
    ],
)
def test_wrong_use_is_said_before_anything_starts(job: Job, changes: Job, message: str) -> None:
    """Outside a Slurm job, or outside the sources, the batch script ends with 2 and says what to do."""
    done = slurm(job | changes, "true")
    assert done.returncode == 2, done.stdout
    assert message in done.stdout
