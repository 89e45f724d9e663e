"""The scripts in launch/ against a real Ray cluster with two nodes, a token and a job server."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from ray_cluster import LocalCluster, local_ray_head, log_tails

from openrlhf_bd.config import Config

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
JOBS = Path(__file__).parent / "jobs"
JOB_TIMEOUT_S = 180.0
NUM_NODES = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_ray_head(NUM_NODES) as started:
        yield started


def run_script(
    cluster: LocalCluster, script: str, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a launch script against the cluster. Its output, stderr included, is in `stdout`."""
    return subprocess.run(
        [LAUNCH / script, *arguments],
        env=cluster.env | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=JOB_TIMEOUT_S,
        check=False,
    )


def submit(cluster: LocalCluster, working_dir: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return run_script(cluster, "ray_job.sh", "--working-dir", str(working_dir), "--", sys.executable, *command)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["-m", "openrlhf_bd.cli.main", "list"], 0),
        (["-c", "raise SystemExit(75)"], 75),
        (["-c", "import os; os.kill(os.getpid(), 9)"], 128 + 9),
    ],
    ids=["list", "status-75", "killed"],
)
def test_exit_status_of_a_job_is_the_drivers(cluster: LocalCluster, command: list[str], status: int) -> None:
    """A launch script ends with the exit status of the job's driver, not with Ray's 0 or 1."""
    finished = submit(cluster, ROOT, *command)
    assert finished.returncode == status, finished.stdout + log_tails(cluster)


@pytest.mark.integration
def test_training_script_reaches_the_command_line_of_the_job(cluster: LocalCluster) -> None:
    """train_bd_ray.sh starts the training command with its flags: a wrong one among them ends it with status 2."""
    finished = run_script(cluster, "train_bd_ray.sh", "--train.no_such_option", "1")
    assert finished.returncode == 2, finished.stdout + log_tails(cluster)
    assert "--train.no_such_option is not an option" in finished.stdout


@pytest.mark.integration
def test_stopped_job_is_no_success(cluster: LocalCluster) -> None:
    """A job that somebody stops ends the launch script with 143, though `ray job submit` ends with 0."""
    command = [LAUNCH / "ray_job.sh", "--working-dir", JOBS, "--", sys.executable, "-uc"]
    command.append("import time; print('started'); time.sleep(600)")
    with subprocess.Popen(command, env=cluster.env, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        output = []
        for line in script.stdout:
            output.append(line)
            if line.strip() == "started":
                break
        (submission_id,) = set(re.findall(r"Job '(bd-[0-9-]+)' submitted", "".join(output)))
        stop = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", submission_id]
        subprocess.run(stop, env=cluster.env, check=True, capture_output=True, timeout=JOB_TIMEOUT_S)
        assert script.wait(JOB_TIMEOUT_S) == 143, "".join(output) + log_tails(cluster)


@pytest.mark.integration
def test_job_uses_every_node(cluster: LocalCluster) -> None:
    """Two nodes on one machine are two nodes to Ray, and a job can place an actor on each."""
    finished = submit(cluster, JOBS, "actor_on_each_node.py", str(NUM_NODES))
    assert finished.returncode == 0, finished.stdout + log_tails(cluster)
    assert f"one actor on each of {NUM_NODES} nodes" in finished.stdout


@pytest.mark.integration
def test_strangers_are_refused(cluster: LocalCluster) -> None:
    """Without the cluster's token no job is taken, and the script says so with a status that is not 0."""
    stranger = {"RAY_AUTH_TOKEN_PATH": "/dev/null", "RAY_AUTH_TOKEN": "0" * 64}
    finished = run_script(cluster, "ray_job.sh", "--working-dir", str(JOBS), "--", "true", **stranger)
    assert finished.returncode != 0, finished.stdout


@pytest.mark.parametrize("word", ["$HOME", "a;b", "it's", "*.jsonl", 'say "x"'])
def test_words_that_a_shell_would_change_are_refused(word: str) -> None:
    """A word of the command that Ray's shell would change is an error before anything is submitted."""
    finished = subprocess.run(
        [LAUNCH / "ray_job.sh", "--", "echo", word], capture_output=True, text=True, timeout=JOB_TIMEOUT_S, check=False
    )
    assert finished.returncode == 2
    assert word in finished.stderr


def test_training_script_names_existing_options() -> None:
    """Every dotted flag in train_bd_ray.sh is an option of the configuration."""
    flags = re.findall(
        r"^ +--([a-z_]+\.[a-z0-9_.]+)", (LAUNCH / "train_bd_ray.sh").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(flags) > 20
    assert set(flags) <= set(_options(Config, ""))


def _options(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _options(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
