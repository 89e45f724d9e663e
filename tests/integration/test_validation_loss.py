"""The loss of the validation set's own responses, by real ranks and through the main job: it selects SFT students."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from student_runs import Material, dense_head, job, on_ranks, start, train
from tiny_job import job_flags, run_job, write_inputs
from transformers import AutoModelForCausalLM

from openrlhf_bd.data.micro_batches import collate
from openrlhf_bd.store import StoreReader
from openrlhf_bd.upstream import RayActorGroup

pytestmark = pytest.mark.integration

LORA = {"rank": 4, "alpha": 8, "dropout": 0.3}


def plain_loss(model: Path, material: Material) -> float:
    """Mean over all response tokens of the model's own -log softmax, without ranks, batches or our head."""
    reader = StoreReader(material.validation)
    batch = collate(reader.rollouts(range(len(reader))), layout="padded", with_sets=False)
    with torch.no_grad():
        logits_SV = dense_head(AutoModelForCausalLM.from_pretrained(model).eval(), batch).logits_SV.double()
    taken_S = batch.trajectories.taken_S
    return float(torch.nn.functional.cross_entropy(logits_SV, taken_S, ignore_index=-1))


@pytest.mark.parametrize(
    "sections",
    [
        {"ds": {"zero_stage": 0}},
        {"ds": {"zero_stage": 1, "packing_samples": True}},
        {"ds": {"zero_stage": 3}, "train": {"dynamic_batch_enable": True, "max_tokens_per_gpu": 24}},
        {"ds": {"zero_stage": 3, "packing_samples": True, "lora": LORA}},
    ],
    ids=str,
)
def test_is_the_mean_over_all_tokens(
    sections: dict[str, dict[str, Any]], two_ranks: RayActorGroup, material: Material
) -> None:
    """7 rows over two ranks: the same number on both, that of the plain model, whatever the strategy."""
    start(two_ranks, job(material, "loss", **sections), material)
    first, second = on_ranks(two_ranks, "validation_loss")
    assert first == second
    assert first == pytest.approx(plain_loss(material.qwen2, material), rel=1e-5)


@pytest.mark.parametrize(
    "sections",
    [
        {"ds": {"zero_stage": 3}},
        {"ds": {"zero_stage": 2, "lora": LORA}, "algo": {"distill": {"next_value_gradient": "target"}}},
        {"ds": {"zero_stage": 0}, "train": {"enable_ema": True}},
    ],
    ids=str,
)
def test_training_does_not_notice(
    sections: dict[str, dict[str, Any]], two_ranks: RayActorGroup, material: Material
) -> None:
    """Every metric of every step is equal to the bit with a validation before each step and without."""
    start(two_ranks, job(material, "unnoticed", **sections), material)
    expected = train(two_ranks, [1, 2, 3])
    start(two_ranks, job(material, "unnoticed", **sections), material)
    found = []
    for step in (1, 2, 3):
        on_ranks(two_ranks, "validation_loss")
        found += train(two_ranks, [step])
    assert found == expected


@pytest.mark.parametrize("ema", [False, True])
def test_is_of_the_student_that_is_saved(ema: bool, two_ranks: RayActorGroup, material: Material) -> None:
    """After training steps it is the loss of the weights that a snapshot holds: with an average, the average's."""
    config = job(material, f"saved-{ema}", train={"enable_ema": ema, "ema_beta": 0.5}, ds={"zero_stage": 3})
    start(two_ranks, config, material)
    train(two_ranks, [1, 2])
    loss = on_ranks(two_ranks, "validation_loss")[0]
    folder = material.folder / f"snapshot-{ema}"
    on_ranks(two_ranks, "save_hf", str(folder))
    assert loss == pytest.approx(plain_loss(folder, material), rel=1e-5)
    assert loss != pytest.approx(plain_loss(material.qwen2, material), rel=1e-3)


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Changes that make a fine-tuning job out of the tiny one; its learning rate makes the loss rise again."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    without = ("algo.distill.preset", "teacher.model_name_or_path", "eval.test_datasets")
    return {
        "folder": str(folder),
        **{name.replace(".", "__"): "" for name in without},
        "algo__distill__name": "sft",
        "ckpt__best_metric_key": "loss",
        "actor__adam__lr": "0.3",
        "actor__lr_scheduler": "constant",
        "actor__num_gpus_per_node": "1",
        "train__max_epochs": "2",
        "eval__steps": "1",
        "ckpt__save_steps": "1",
        "ckpt__save_hf": "true",
        "ckpt__max_num": "2",
    }


def tune(tuning: dict[str, str], run: Path, **changes: str) -> str:
    """Run the job; what it printed."""
    options = {name: value for name, value in tuning.items() if name != "folder"}
    done = run_job(*job_flags(Path(tuning["folder"]), run, **{**options, **changes}))
    assert done.returncode == 0, done.stdout
    return done.stdout


def validation_losses(run: Path) -> dict[int, float]:
    """Validation loss by step; no other validation was made."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validations = [record for record in records if any(name.startswith("eval/") for name in record)]
    assert not any("eval/rouge_l" in record for record in validations)
    return {record["step"]: record["eval/loss"] for record in validations}


def assert_selected(run: Path, losses: dict[int, float]) -> None:
    best = min(losses, key=lambda step: losses[step])
    selection = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]["training"]["selection"]
    assert (selection["metric"], selection["step"], selection["value"]) == ("loss", best, losses[best])


@pytest.fixture(scope="module")
def tuned(tuning: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "tuned"
    return run, tune(tuning, run)


def test_fine_tuning_keeps_the_student_of_the_lowest_loss(tuned: tuple[Path, str]) -> None:
    """An sft job selects by loss, where lower is better, and starts no engine."""
    run, said = tuned
    losses = validation_losses(run)
    assert sorted(losses) == [1, 2, 3, 4]
    assert_selected(run, losses)
    assert "engine" not in said


def test_students_of_old_checkpoints_go(tuned: tuple[Path, str]) -> None:
    """--ckpt.save_hf keeps as many students as --ckpt.max_num keeps checkpoints."""
    folder = tuned[0] / "checkpoints"
    assert sorted(entry.name for entry in folder.glob("global_step*_hf")) == ["global_step3_hf", "global_step4_hf"]
    assert sorted(entry.name for entry in folder.glob("_actor/global_step*")) == ["global_step3", "global_step4"]


def test_run_from_anothers_checkpoint_selects_anew(tuning: dict[str, str], tuned: tuple[Path, str]) -> None:
    """With --ckpt.load_enable a run goes on after step 4 of another, whose best student is not its own."""
    first, _ = tuned
    run = first.parent / "further"
    further = {
        "ckpt__path": str(first / "checkpoints"),
        "ckpt__load_enable": "true",
        "train__max_epochs": "3",
        "train__max_steps": "6",
    }
    tune(tuning, run, **further, actor__adam__lr="3")
    losses = validation_losses(run)
    assert sorted(losses) == [5, 6]
    assert min(losses.values()) > min(validation_losses(first).values())
    assert_selected(run, losses)
