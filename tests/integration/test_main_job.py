"""The main job from the command line: real Ray, vLLM and DeepSpeed, from prompts to an evaluated student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ray_cluster import local_ray_head
from timelines import check_timeline
from tiny_job import job_environment, job_flags, run_job, write_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_bd.evaluation.results import Evaluation
from openrlhf_bd.store import StoreReader, verify_store

pytestmark = pytest.mark.integration

WANDB_KEY = "0123456789" * 3 + "thesecret0"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def finished_run(inputs: Path) -> Path:
    """Logged by Weights & Biases too, which has no network."""
    run = inputs / "run"
    (inputs / "wandb").mkdir()
    environment = job_environment() | {"WANDB_MODE": "offline", "WANDB_DIR": str(inputs / "wandb")}
    done = run_job(*job_flags(inputs, run, logger__wandb__key=WANDB_KEY), environment=environment)
    assert done.returncode == 0, done.stdout
    assert WANDB_KEY not in done.stdout
    return run


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_run_leaves_a_student_that_transformers_loads(finished_run: Path) -> None:
    """The run folder is a Hugging Face model whose weights were trained and are finite."""
    student = AutoModelForCausalLM.from_pretrained(finished_run)
    start = AutoModelForCausalLM.from_pretrained(finished_run.parent / "student")
    tokenizer = AutoTokenizer.from_pretrained(finished_run)
    changed = [not torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True)]
    assert any(changed)
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    assert student.config.vocab_size >= len(tokenizer)


def test_store_holds_every_row_once(finished_run: Path) -> None:
    """Two samples of each of the 24 prompts, with a set for each token and log-probabilities for each candidate."""
    reader = StoreReader(finished_run / "teacher_data")
    assert sorted(reader.row_ids) == sorted(f"{prompt:08d}:{sample}" for prompt in range(24) for sample in range(2))
    for rollout in reader.rollouts(range(len(reader))):
        assert rollout.sets is not None
        assert rollout.sets.num_states - len(rollout.response_ids) == (rollout.finish_reason == "length")
        assert rollout.sets.logprobs_M is not None
    verify_store(reader.path)


def test_metrics_have_every_step_once(finished_run: Path) -> None:
    """One training record a step with OpenRLHF's names, and a validation record every second step."""
    records = read_metrics(finished_run)
    training = [record for record in records if "train/policy_loss" in record]
    assert [record["step"] for record in training] == [1, 2, 3, 4]
    assert all({"train/actor_lr", "train/actor_grad_norm", "train/ptx_loss"} <= record.keys() for record in training)
    assert [record["step"] for record in records if "eval/rouge_l" in record] == [2, 4]


def test_evaluation_covers_seeds_and_measures(finished_run: Path) -> None:
    """Six test prompts at two seeds: Rouge-L and accuracy of each."""
    scores = Evaluation.read(finished_run).datasets["test"]
    assert (scores.num_prompts, scores.seeds) == (6, [10, 20])
    assert scores.rouge_l is not None
    assert len(scores.rouge_l) == 2
    assert scores.accuracy is not None
    assert (finished_run / "report.html").stat().st_size > 10_000


def test_who_worked_and_what_it_took(finished_run: Path) -> None:
    """Spans of teacher, student's engine, ranks and driver in the run's time; each stage's GPUs and seconds."""
    timeline = check_timeline(finished_run, {"teacher engine 0", "student engine 0", "student ranks", "driver"})
    [rows] = timeline.of("driver", "generate")
    [generated] = timeline.of("teacher engine 0", "generate")[:1]
    assert rows.start_s <= generated.start_s <= rows.end_s
    assert [span.step for span in timeline.of("driver", "validate")] == [2, 4]
    [evaluation] = timeline.of("driver", "evaluate")
    assert evaluation.start_s > timeline.of("student ranks", "train")[-1].end_s
    stages = json.loads((finished_run / "run.json").read_text(encoding="utf-8"))["stages"]
    # One teacher's engine; two ranks and an engine that validates; one engine.
    assert {name: record["gpus"] for name, record in stages.items() if "gpus" in record} == {
        "rows": 1,
        "training": 3,
        "evaluation": 1,
    }
    assert all(stages[name]["seconds"] > 0 for name in ("rows", "training", "evaluation"))


def test_scores_are_logged_and_the_key_nowhere(inputs: Path, finished_run: Path) -> None:
    """TensorBoard and Weights & Biases have OpenRLHF's names and the final scores; no file has the key."""
    logs = [list((finished_run / "tensorboard").rglob("events*")), list((inputs / "wandb").rglob("offline-*/*.wandb"))]
    for files in logs:
        # Training, and the evaluation after it.
        assert len(files) == 2
        content = b"".join(path.read_bytes() for path in files)
        for name in (b"train/policy_loss", b"train/actor_lr", b"eval/rouge_l", b"eval/test/test/rouge_l"):
            assert name in content
    assert len({path.name for path in logs[1]}) == 1, "one run in Weights & Biases"
    for path in inputs.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert WANDB_KEY.encode() not in path.read_bytes(), path


def test_same_command_again_reuses_everything(inputs: Path, finished_run: Path) -> None:
    """A finished run is not done again, and its files stay as they are."""
    before = (finished_run / "model.safetensors").read_bytes()
    done = run_job(*job_flags(inputs, finished_run))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("reused") == 2, done.stdout
    assert (finished_run / "model.safetensors").read_bytes() == before


def test_job_without_a_mask(inputs: Path) -> None:
    """At p = 1 the store lists no ids, the student trains on whole vocabularies, and a smaller p is refused later."""
    run = inputs / "no_mask"
    changes = {"algo__distill__preset": "paper", "actor__num_gpus_per_node": "1", "eval__test_datasets": ""}
    changes |= {"eval__dataset": "", "train__max_steps": "2"}
    done = run_job(*job_flags(inputs, run, algo__distill__top_p="1", **changes))
    assert done.returncode == 0, done.stdout
    reader = StoreReader(run / "teacher_data")
    assert all(rollout.sets is not None and rollout.sets.is_whole for rollout in reader.rollouts(range(len(reader))))
    metrics = read_metrics(run)
    assert [record["step"] for record in metrics] == [1, 2]
    assert not {"train/set_size", "train/out_of_set_rate"} & metrics[-1].keys()
    done = run_job(
        *job_flags(inputs, inputs / "mask", teacher__store_path=str(reader.path), algo__distill__top_p="0.8", **changes)
    )
    assert done.returncode == 2, done.stdout
    assert "found top_p 1, where no ids are listed that could be cut" in " ".join(done.stdout.split())


def test_another_run_does_not_touch_the_folder(inputs: Path, finished_run: Path) -> None:
    """Other options in the folder of a finished run: status 2, the option is named, nothing changes."""
    done = run_job(*job_flags(inputs, finished_run, algo__distill__gamma="0.5"))
    assert done.returncode == 2
    assert "algo.distill.gamma: there 0.99, now 0.5" in done.stdout
    assert "Traceback" not in done.stdout


def test_more_gpus_than_the_cluster_has(inputs: Path) -> None:
    """A job that no node can hold ends with status 2 before an actor starts, and leaves no folder."""
    with local_ray_head(1, num_gpus=1) as cluster:
        done = run_job(
            *job_flags(inputs, inputs / "too_large"), environment={**cluster.env, "RAY_ADDRESS": cluster.address}
        )
    assert done.returncode == 2, done.stdout
    assert "--actor.num_gpus_per_node 2" in done.stdout
    assert not (inputs / "too_large").exists()
