"""The main job is killed, and the same command goes on: the result is that of a run that nobody killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from openrlhf_bd.evaluation.timeline import read_timeline
from tests.integration.tiny_job import JOB_TIMEOUT_S, job_environment, job_flags, run_job, write_inputs

pytestmark = pytest.mark.chaos

STEPS = 8


def flags(inputs: Path, run: Path, store: Path) -> list[str]:
    return job_flags(
        inputs,
        run,
        teacher__store_path=str(store),
        train__max_steps=str(STEPS),
        train__max_epochs="2",
        ckpt__save_steps="1",
        eval__dataset="",
        eval__steps="",
        eval__test_datasets="",
    )


def steps_of(run: Path) -> dict[int, dict[str, float]]:
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["step"]: record for record in map(json.loads, lines)}


def kill_at_step(arguments: list[str], run: Path, step: int) -> int:
    """Starts the job, kills its driver outright once the step is on record; returns the last step that was."""
    command = [sys.executable, "-m", "openrlhf_bd.cli.train_bd_ray", *arguments]
    with subprocess.Popen(command, env=job_environment(), start_new_session=True) as job:
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while step not in steps_of(run):
            assert job.poll() is None, f"the job ended by itself with {job.returncode}"
            assert time.monotonic() < deadline, f"step {step} was not reached in {JOB_TIMEOUT_S:.0f} s"
            time.sleep(0.05)
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    return max(steps_of(run))


def test_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """kill -9 of the driver in the middle of training: the resumed run has the same losses and weights, bit for bit.

    And a run that finds its checkpoints in the folder of another one is refused.
    """
    write_inputs(tmp_path)
    store = tmp_path / "store"
    whole = run_job(*flags(tmp_path, tmp_path / "whole", store))
    assert whole.returncode == 0, whole.stdout

    arguments = flags(tmp_path, tmp_path / "killed", store)
    last = kill_at_step(arguments, tmp_path / "killed", 3)
    assert 3 <= last < STEPS
    resumed = run_job(*arguments)
    assert resumed.returncode == 0, resumed.stdout

    # Steps done again stand there again, in the session that did them.
    timeline = read_timeline(tmp_path / "killed")
    assert timeline is not None
    assert timeline.sessions == (1, 2)
    assert timeline.of("driver", "train", session=1)[0].step == 1
    again = [span.step for span in timeline.of("student ranks", "train", session=2)]
    assert again == list(range(STEPS + 1 - len(again), STEPS + 1))

    expected, found = steps_of(tmp_path / "whole"), steps_of(tmp_path / "killed")
    assert list(found) == list(range(1, STEPS + 1))
    for step, record in expected.items():
        assert found[step]["train/loss"] == record["train/loss"]
        assert found[step]["train/actor_grad_norm"] == record["train/actor_grad_norm"]
    weights, resumed_weights = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "killed"))
    assert all(weights[name].equal(resumed_weights[name]) for name in weights)

    foreign = ["--ckpt.output_dir", str(tmp_path / "other"), "--ckpt.path", str(tmp_path / "whole" / "checkpoints")]
    other = run_job(*arguments, *foreign)
    assert other.returncode == 2, other.stdout
    assert "checkpoint global_step8 of another run; give --ckpt.load_enable" in other.stdout
