"""What the nodes of a cluster see, asked on two nodes of which one does not see a folder of the other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray_cluster import LocalCluster, can_mount, local_ray_head, log_tails
from tiny_job import job_flags, run_job, write_inputs

from openrlhf_bd.demo.models import TEACHER_FOLDER

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not can_mount(), reason="hiding a folder from a node needs the rights to mount"),
]
JOBS = Path(__file__).parent / "jobs"
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Nodes:
    """Two nodes.

    Attributes:
        cluster: of them.
        shared: a folder that both see.
        hidden: a folder of which the second sees an empty one in its place.
    """

    cluster: LocalCluster
    shared: Path
    hidden: Path


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    shared, hidden = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("hidden")
    shutil.copytree(TEACHER_FOLDER, shared / "model")
    shutil.copytree(TEACHER_FOLDER, hidden / "model")
    write_inputs(shared)
    with local_ray_head(2, num_gpus=1, hidden=hidden) as cluster:
        yield Nodes(cluster, shared, hidden)


def look(nodes: Nodes, folder: Path, model: Path, *, timeout_s: float = 60.0) -> tuple[int, str]:
    """Exit status and output of the question, its line breaks as spaces."""
    done = subprocess.run(
        [sys.executable, JOBS / "view_of_nodes.py", str(folder), str(model), str(timeout_s)],
        env=nodes.cluster.env | {"RAY_ADDRESS": nodes.cluster.address, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, " ".join(done.stdout.split())


def test_nodes_that_see_the_same(nodes: Nodes) -> None:
    """A folder and a model that both nodes see are fine, the folder also before it is made; nothing stays there."""
    before = sorted(nodes.shared.iterdir())
    status, output = look(nodes, nodes.shared / "new" / "run", nodes.shared / "model")
    assert (status, output.endswith("2 nodes see the same")) == (0, True), output + log_tails(nodes.cluster)
    assert sorted(nodes.shared.iterdir()) == before


def test_folder_that_one_node_does_not_see(nodes: Nodes) -> None:
    """A folder of the same name that is not the driver's is told from it; the message names node, option and folder."""
    status, output = look(nodes, nodes.hidden / "run", nodes.shared / "model")
    assert status == 2, output
    expected = f"--folder {nodes.hidden}/run: node 127.0.0.3 does not see what the driver writes to {nodes.hidden}: "
    assert expected + "it has another folder of that name" in output
    assert sorted(nodes.hidden.iterdir()) == [nodes.hidden / "model"]


def test_model_that_one_node_does_not_see(nodes: Nodes) -> None:
    """A model folder that a node lacks is named with that node."""
    status, output = look(nodes, nodes.shared, nodes.hidden / "model")
    assert status == 2, output
    assert f"--model {nodes.hidden}/model: is missing on node 127.0.0.3; every node loads it from there" in output


def test_node_that_does_not_answer(nodes: Nodes) -> None:
    """Whoever does not answer in time is named, with status 75."""
    status, output = look(nodes, nodes.shared, nodes.shared / "model", timeout_s=0.001)
    assert status == 75, output
    assert "no answer within 0 s from node 127.0.0.3" in output


def test_job_ends_before_it_takes_anything(nodes: Nodes) -> None:
    """The training command finds the folder that is not shared before it makes the run folder or starts an actor."""
    done = run_job(
        *job_flags(nodes.shared, nodes.hidden / "run", actor__num_gpus_per_node="1", eval__dataset="", eval__steps=""),
        environment=nodes.cluster.env | {"RAY_ADDRESS": nodes.cluster.address},
    )
    assert done.returncode == 2, done.stdout
    assert f"--ckpt.output_dir {nodes.hidden}/run: node 127.0.0.3 does not see" in " ".join(done.stdout.split())
    assert "starting" not in done.stdout
    assert not (nodes.hidden / "run").exists()


def test_evaluation_ends_before_it_takes_anything(nodes: Nodes) -> None:
    """A model that is evaluated and that one node lacks is named by its label, before an engine starts."""
    flags = {
        "models": f"One={nodes.shared / 'model'},Two={nodes.hidden / 'model'}",
        "data.input_key": "instruction",
        "data.label_key": "output",
        "data.max_len": "160",
        "eval.test_datasets": f"test={nodes.shared / 'corpus' / 'test.jsonl'}",
        "ckpt.output_dir": str(nodes.shared / "evaluation"),
    }
    done = run_job(
        *(word for name, value in flags.items() for word in (f"--{name}", value)),
        module="openrlhf_bd.cli.evaluate",
        environment=nodes.cluster.env | {"RAY_ADDRESS": nodes.cluster.address},
    )
    assert done.returncode == 2, done.stdout
    output = " ".join(done.stdout.split())
    assert f"model 'Two' {nodes.hidden}/model: is missing on node 127.0.0.3" in output
    assert "starting" not in output
    assert not (nodes.shared / "evaluation").exists()
