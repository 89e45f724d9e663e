"""The main job on Ray clusters: through `ray job submit` on one node, and over two nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import local_ray_head, log_tails
from tiny_job import JOB_TIMEOUT_S, job_flags, write_inputs

from openrlhf_bd.evaluation.results import Evaluation

pytestmark = pytest.mark.integration

LAUNCH = Path(__file__).parents[2] / "launch"


def test_demo_as_a_job_of_a_running_head(tmp_path: Path) -> None:
    """launch/demo.sh runs the demo through `ray job submit`, ends with its status, and leaves table and report."""
    with local_ray_head(1) as cluster:
        done = subprocess.run(
            [LAUNCH / "demo.sh", "--tiny"],
            env={**cluster.env, "METHODS": "bd:robust", "OUT": str(tmp_path / "demo"), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=JOB_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + log_tails(cluster)
    evaluated = {path.stem for path in (tmp_path / "demo" / "evaluation").glob("*.json")}
    assert evaluated == {"teacher", "sft", "sft-continued", "bd-robust"}
    assert Evaluation.read(tmp_path / "demo" / "evaluation" / "bd-robust.json").datasets["test"].accuracy is not None
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000


def test_ranks_on_two_nodes_train_together(tmp_path: Path) -> None:
    """Two nodes with one GPU each, one rank on each: a submitted job trains and saves the student."""
    write_inputs(tmp_path)
    flags = job_flags(
        tmp_path,
        tmp_path / "run",
        actor__num_nodes="2",
        actor__num_gpus_per_node="1",
        train__max_steps="2",
        eval__dataset="",
        eval__steps="",
        eval__test_datasets="",
    )
    job = [sys.executable, "-m", "openrlhf_bd.cli.train_bd_ray", *flags]
    with local_ray_head(2, num_gpus=1) as cluster:
        done = subprocess.run(
            [LAUNCH / "ray_job.sh", "--working-dir", LAUNCH, "--", *job],
            env={**cluster.env, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=JOB_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + log_tails(cluster)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (tmp_path / "run" / "model.safetensors").is_file()
