"""The student's ranks: real Ray actors with DeepSpeed over gloo, on a tiny random model and a store written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from student_runs import (
    BATCH,
    NUM_ROWS,
    Material,
    assert_same_training,
    errors_of,
    job,
    on_ranks,
    plain_loop,
    start,
    train,
)
from transformers import AutoModelForCausalLM

from openrlhf_bd.data.order import RowOrder
from openrlhf_bd.errors import ConfigError, StoreError, TrainingError
from openrlhf_bd.upstream import RayActorGroup

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def expected(material: Material) -> list[dict[str, float]]:
    return plain_loop(job(material, "plain"), material)[0]


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "zero 2": {},
    "zero 0": {"ds": {"zero_stage": 0}},
    "zero 1": {"ds": {"zero_stage": 1}},
    "zero 3": {"ds": {"zero_stage": 3}},
    "packed": {"ds": {"packing_samples": True}},
    "micro-batches of 1": {"train": {"micro_batch_size": 1}},
    "micro-batches of 8": {"train": {"micro_batch_size": 8}},
    "dynamic": {"train": {"dynamic_batch_enable": True, "max_tokens_per_gpu": 24}},
    "dynamic, packed, zero 3": {
        "train": {"dynamic_batch_enable": True, "max_tokens_per_gpu": 24},
        "ds": {"packing_samples": True, "zero_stage": 3},
    },
    "gradient checkpointing": {"actor": {"gradient_checkpointing_enable": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_train_as_a_plain_loop_does(
    variant: str, two_ranks: RayActorGroup, material: Material, expected: list[dict[str, float]]
) -> None:
    """Losses and gradients depend neither on ZeRO stage, micro-batches nor packing: all equal a plain torch loop's."""
    start(two_ranks, job(material, "variant", **VARIANTS[variant]), material)
    assert_same_training(train(two_ranks), expected)


def test_one_rank_trains_as_a_plain_loop_does(
    one_rank: RayActorGroup, material: Material, expected: list[dict[str, float]]
) -> None:
    """One rank computes what two do."""
    start(one_rank, job(material, "one"), material)
    assert_same_training(train(one_rank), expected)


def test_fewer_rows_than_ranks(two_ranks: RayActorGroup, material: Material) -> None:
    """A rank without a row or block of its own changes nothing: its filler counts for nothing."""
    config = job(material, "few", train={"batch_size": 1, "pretrain_batch_size": 1}, ds={"zero_stage": 3})
    start(two_ranks, config, material)
    assert_same_training(train(two_ranks), plain_loop(config, material)[0])


def test_bf16_follows_fp32(two_ranks: RayActorGroup, material: Material, expected: list[dict[str, float]]) -> None:
    """bf16 parameters with fp32 optimizer states follow the fp32 run within bf16's precision, and are saved as bf16."""
    start(two_ranks, job(material, "bf16", ds={"param_dtype": "bf16"}), material)
    for here, there in zip(train(two_ranks), expected, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=0.05)
    on_ranks(two_ranks, "save_hf", str(material.folder / "bf16"))
    assert AutoModelForCausalLM.from_pretrained(material.folder / "bf16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "ds", [{"zero_stage": 2}, {"zero_stage": 3, "packing_samples": True}], ids=["zero 2", "zero 3"]
)
def test_gpt2(ds: dict[str, Any], two_ranks: RayActorGroup, material: Material) -> None:
    """A family with learned positions and tied embeddings trains the same way, also partitioned and packed."""
    config = job(material, "gpt2", model=material.gpt2, ds=ds)
    start(two_ranks, config, material)
    assert_same_training(train(two_ranks), plain_loop(config, material)[0])


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_resumed_run_is_bit_identical(
    zero_stage: int, two_ranks: RayActorGroup, two_other_ranks: RayActorGroup, material: Material
) -> None:
    """Steps after a resume are equal to those of a run without a stop, to the last bit; so is the student."""
    schedule = {"lr_scheduler": "cosine_with_min_lr", "lr_warmup_ratio": 0.3}
    sections: dict[str, dict[str, Any]] = {"ds": {"zero_stage": zero_stage}, "actor": schedule}
    run = f"resume-{zero_stage}"
    config = job(material, run, **sections)
    start(two_ranks, config, material)
    train(two_ranks, [1, 2])
    on_ranks(two_ranks, "save_checkpoint", "global_step2", {"step": 2})
    whole = train(two_ranks, [3, 4])
    on_ranks(two_ranks, "save_hf", str(material.folder / run / "whole"))

    start(two_other_ranks, job(material, run, ckpt={"load_enable": True}, **sections), material)
    assert on_ranks(two_other_ranks, "load_checkpoint") == [{"step": 2}, {"step": 2}]
    resumed = train(two_other_ranks, [3, 4])
    on_ranks(two_other_ranks, "save_hf", str(material.folder / run / "resumed"))
    assert resumed == whole
    weights = [(material.folder / run / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_saved_student_loads_in_transformers(
    family: str, zero_stage: int, two_ranks: RayActorGroup, material: Material
) -> None:
    """A saved student has every weight under its Hugging Face name, the tokenizer, and nothing half-written beside."""
    source = material.folder / family
    config = job(material, f"save-{family}-{zero_stage}", model=source, ds={"zero_stage": zero_stage})
    start(two_ranks, config, material)
    target = material.folder / f"saved-{family}-{zero_stage}"
    for _ in range(2):  # a folder of that name is replaced
        on_ranks(two_ranks, "save_hf", str(target))
    saved, original = AutoModelForCausalLM.from_pretrained(target), AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(saved(ids).logits, original(ids).logits, rtol=0, atol=0)
    assert (target / "tokenizer.json").read_text(encoding="utf-8") == "{}"
    assert sorted(entry.name for entry in material.folder.glob(f"{target.name}*")) == [target.name]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (target, source)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)  # tied weights are not written twice


@pytest.mark.parametrize("ds", [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}], ids=str)
def test_not_a_number_stops_every_rank_before_the_step(
    ds: dict[str, Any], two_ranks: RayActorGroup, material: Material
) -> None:
    """A loss that is not finite raises on all ranks, names step and rows, and changes no weight."""
    config = job(material, "nan", model=material.not_a_number, ds=ds, algo={"distill": {"name": "seqkd"}})
    start(two_ranks, config, material)
    rows = RowOrder(NUM_ROWS, BATCH, config.train.seed).rows(1)
    for error in errors_of(two_ranks, "train_step", 1):
        assert isinstance(error, TrainingError)
        assert "step 1: the loss is not finite" in str(error)
        assert all(f"prompt-{row}:0" in str(error) for row in rows)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_gradient_that_overflows_stops_every_rank(
    zero_stage: int, two_ranks: RayActorGroup, material: Material
) -> None:
    """A finite loss with a gradient that is not finite raises on all ranks and changes no weight."""
    sections: dict[str, dict[str, Any]] = {
        "ds": {"zero_stage": zero_stage},
        "algo": {"distill": {"pretrain_coef": 1e38}},
    }
    run = f"overflow-{zero_stage}"
    start(two_ranks, job(material, run, **sections), material)
    for error in errors_of(two_ranks, "train_step", 1):
        assert isinstance(error, TrainingError)
        assert "step 1: the gradient is not finite" in str(error)
    on_ranks(two_ranks, "save_hf", str(material.folder / run))
    after = AutoModelForCausalLM.from_pretrained(material.folder / run).state_dict()
    before = AutoModelForCausalLM.from_pretrained(material.qwen2).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


class TestCheckpoints:
    @pytest.fixture(scope="class")
    def saved(self, two_ranks: RayActorGroup, material: Material) -> Path:
        """Checkpoints of steps 1 to 3 of a run that keeps two."""
        start(two_ranks, job(material, "kept", ckpt={"max_num": 2, "save_hf": True}), material)
        for step in (1, 2, 3):
            train(two_ranks, [step])
            on_ranks(two_ranks, "save_checkpoint", f"global_step{step}", {"step": step}, 0.5, "rouge_l")
        return material.folder / "kept" / "checkpoints" / "_actor"

    def test_newest_are_kept(self, saved: Path) -> None:
        """The newest checkpoints stay, older ones go, nothing half-written is left, `latest` names the newest."""
        assert sorted(entry.name for entry in saved.iterdir() if entry.is_dir()) == ["global_step2", "global_step3"]
        assert (saved / "latest").read_text(encoding="utf-8") == "global_step3"
        assert (saved.parent / "global_step3_hf" / "model.safetensors").is_file()

    def test_named_checkpoint_must_be_there(self, saved: Path, two_ranks: RayActorGroup) -> None:
        """Asking for a checkpoint that is not there is an error that lists those that are."""
        for error in errors_of(two_ranks, "load_checkpoint", "global_step1"):
            assert isinstance(error, StoreError)
            assert "global_step2, global_step3" in str(error)

    def test_checkpoint_of_other_ranks_is_refused(
        self, saved: Path, one_rank: RayActorGroup, material: Material
    ) -> None:
        """A checkpoint of another number of ranks is refused with what to do."""
        start(one_rank, job(material, "kept"), material)
        [error] = errors_of(one_rank, "load_checkpoint", "global_step3")
        assert isinstance(error, ConfigError)
        assert "written by 2 ranks" in str(error)

    def test_one_flipped_byte_is_noticed(self, saved: Path, two_ranks: RayActorGroup) -> None:
        """A changed byte in any file is an error on every rank that names the file; DeepSpeed would load it."""
        file = next(saved.glob("global_step2/*optim_states.pt"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        for error in errors_of(two_ranks, "load_checkpoint", "global_step2"):
            assert isinstance(error, StoreError)
            assert file.name in str(error)
