"""LoRA, running averages, Muon and memory options in the student's real ranks: DeepSpeed over gloo, tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from student_runs import STOP, VOCAB, Material, assert_same_training, errors_of, job, on_ranks, save_model, start, train
from tiny_job import job_flags, run_job, write_inputs
from transformers import AutoModelForCausalLM, Qwen2Config

from openrlhf_bd.errors import ConfigError
from openrlhf_bd.upstream import RayActorGroup

pytestmark = pytest.mark.integration

LORA: dict[str, Any] = {"rank": 4, "alpha": 8}
MUON: dict[str, Any] = {"optim": "muon", "max_norm": 0.0, "muon": {"lr": 0.02}}
IDS = torch.arange(2, 12)[None]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def wide(material: Material) -> Path:
    """A model with weights so large that ZeRO-3 gives back what it gathers of them: more than 100,000 numbers."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=320,
        intermediate_size=352,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=STOP,
    )
    return save_model(config, material.folder / "wide")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def saved(ranks: RayActorGroup, folder: Path) -> Weights:
    """The student's weights as the ranks save them."""
    on_ranks(ranks, "save_hf", str(folder))
    return load_file(folder / "model.safetensors")


def of_training(metrics: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """What does not depend on how a step is computed."""
    return [{name: step[name] for name in ("loss", "policy_loss", "ptx_loss", "actor_grad_norm")} for step in metrics]


def changed(before: Weights, after: Weights) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_resumes(
    ranks: RayActorGroup, others: RayActorGroup, material: Material, run: str, **sections: dict[str, Any]
) -> None:
    """Metrics and saved weights after a resume in other processes are those of the run without a stop, to the bit."""
    folder = material.folder / run
    start(ranks, job(material, run, **sections), material)
    train(ranks, [1, 2])
    on_ranks(ranks, "save_checkpoint", "global_step2", {"step": 2})
    metrics, weights = train(ranks, [3, 4]), saved(ranks, folder / "whole")
    start(others, job(material, run, ckpt={"load_enable": True}, **sections), material)
    on_ranks(others, "load_checkpoint")
    assert train(others, [3, 4]) == metrics
    assert changed(saved(others, folder / "resumed"), weights) == set()


class TestLora:
    @pytest.fixture(scope="class")
    def expected(self, one_rank: RayActorGroup, material: Material) -> list[dict[str, float]]:
        start(one_rank, job(material, "lora", ds={"lora": LORA}), material)
        return of_training(train(one_rank))

    @pytest.mark.parametrize(
        "sections",
        [
            {"ds": {"zero_stage": 0}},
            {"ds": {"zero_stage": 1}},
            {"ds": {"zero_stage": 3}},
            {"ds": {"packing_samples": True}},
            {"ds": {"zero_stage": 3}, "actor": {"gradient_checkpointing_enable": True}},
            {"actor": {"gradient_checkpointing_enable": True, "gradient_checkpointing_reentrant": True}},
        ],
        ids=str,
    )
    def test_same_whatever_the_strategy(
        self,
        sections: dict[str, dict[str, Any]],
        two_ranks: RayActorGroup,
        material: Material,
        expected: list[dict[str, float]],
    ) -> None:
        """Ranks, ZeRO stage, packing and checkpointing of activations change no loss and no gradient of adapters."""
        ds = {"lora": LORA, **sections.get("ds", {})}
        start(two_ranks, job(material, "lora", **{**sections, "ds": ds}), material)
        assert_same_training(train(two_ranks), expected)

    @pytest.mark.parametrize("zero_stage", [0, 2, 3])
    @pytest.mark.parametrize("family", ["qwen2", "gpt2", "wide"])
    def test_saved_student(
        self, family: str, zero_stage: int, two_ranks: RayActorGroup, material: Material, wide: Path
    ) -> None:
        """The loss falls; only adapted layers change; the merged model gives the logits of base and adapter."""
        source, run = material.folder / family, f"lora-{family}-{zero_stage}"
        ds = {"zero_stage": zero_stage, "lora": LORA}
        start(two_ranks, job(material, run, model=source, ds=ds, actor={"adam": {"lr": 3e-3}}), material)
        losses = [metrics["loss"] for metrics in train(two_ranks, [1, 1, 1, 1])]
        assert losses[3] < losses[0]
        before, after = load_file(source / "model.safetensors"), saved(two_ranks, material.folder / run)
        layers = {name for name, weight in before.items() if weight.ndim == 2 and (".layers." in name or ".h." in name)}
        assert changed(before, after) == layers

        base = AutoModelForCausalLM.from_pretrained(source)
        at_start = logits(base)
        merged = logits(AutoModelForCausalLM.from_pretrained(material.folder / run))
        live = logits(PeftModel.from_pretrained(base, material.folder / run / "adapter"))
        assert (merged - at_start).abs().max() > 1e-3
        torch.testing.assert_close(merged, live, rtol=0, atol=1e-5)

    def test_saving_leaves_training_alone(
        self, two_ranks: RayActorGroup, material: Material, expected: list[dict[str, float]]
    ) -> None:
        """A student that is saved in the middle trains on as one that is not: merging works on copies."""
        start(two_ranks, job(material, "lora-saved", ds={"lora": LORA}), material)
        first = train(two_ranks, [1, 2])
        saved(two_ranks, material.folder / "lora-saved")
        assert_same_training([*first, *train(two_ranks, [3, 4])], expected)

    def test_named_layers(self, two_ranks: RayActorGroup, material: Material) -> None:
        """With named target modules only those layers change."""
        lora = {**LORA, "target_modules": ["q_proj", "self_attn.v_proj"]}
        start(two_ranks, job(material, "lora-named", ds={"lora": lora}), material)
        train(two_ranks, [1])
        before = load_file(material.qwen2 / "model.safetensors")
        names = changed(before, saved(two_ranks, material.folder / "lora-named"))
        assert {name.rpartition("self_attn.")[2] for name in names} == {"q_proj.weight", "v_proj.weight"}

    def test_bf16(self, two_ranks: RayActorGroup, material: Material) -> None:
        """bf16 weights are merged in fp32 and rounded once: W + (alpha / r) B A."""
        start(two_ranks, job(material, "lora-bf16", ds={"lora": LORA, "param_dtype": "bf16"}), material)
        train(two_ranks)
        folder, name = material.folder / "lora-bf16", "model.layers.0.mlp.up_proj"
        after = saved(two_ranks, folder)[f"{name}.weight"]
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        lora_A, lora_B = (adapter[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
        base = load_file(material.qwen2 / "model.safetensors")[f"{name}.weight"].bfloat16()
        assert after.dtype == torch.bfloat16
        torch.testing.assert_close(after, (base.float() + 2.0 * lora_B @ lora_A).bfloat16(), rtol=0, atol=0)

    @pytest.mark.parametrize("zero_stage", [0, 2, 3])
    def test_resumed_run_is_bit_identical(
        self, zero_stage: int, two_ranks: RayActorGroup, two_other_ranks: RayActorGroup, material: Material
    ) -> None:
        """A resumed LoRA run repeats the run without a stop, its dropout included."""
        ds = {"zero_stage": zero_stage, "lora": {**LORA, "dropout": 0.2}}
        assert_resumes(two_ranks, two_other_ranks, material, f"lora-resume-{zero_stage}", ds=ds)

    def test_layer_that_is_not_there(self, two_ranks: RayActorGroup, material: Material) -> None:
        """A target module that matches nothing is refused with the names that there are."""
        lora = {**LORA, "target_modules": ["q_proj", "query_key_value"]}
        with pytest.raises(ConfigError, match=r"query_key_value: .*\(qwen2\).*down_proj, gate_proj, k_proj"):
            start(two_ranks, job(material, "lora-wrong", ds={"lora": lora}), material)


class TestAverage:
    BETA = 0.75
    TARGET: ClassVar = {"algo": {"distill": {"next_value_gradient": "target", "target_decay": 0.5}}}
    RESUMED: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "zero 0": {"ds": {"zero_stage": 0}},
        "zero 2": {"ds": {"zero_stage": 2}},
        # In a process that once ran ZeRO-3, DeepSpeed's own linear layer stays and rounds a bf16 bias separately: only
        # under ZeRO-3 do processes of other histories agree to the bit in bf16.
        "zero 3, bf16": {"ds": {"zero_stage": 3, "param_dtype": "bf16"}},
        "zero 3": {"ds": {"zero_stage": 3}},
        "zero 3, adapters": {"ds": {"zero_stage": 3, "lora": LORA}},
        "zero 2, target network": {"ds": {"zero_stage": 2}, **TARGET},
        "zero 3, target network": {"ds": {"zero_stage": 3}, **TARGET},
    }

    @pytest.fixture(scope="class")
    def history(self, two_ranks: RayActorGroup, material: Material, wide: Path) -> list[Weights]:
        """The weights before the first step and after each of four."""
        start(two_ranks, job(material, "history", model=wide, actor={"adam": {"lr": 3e-3}}), material)
        weights = [load_file(wide / "model.safetensors")]
        for step in (1, 2, 3, 4):
            train(two_ranks, [step])
            weights.append(saved(two_ranks, material.folder / "history"))
        return weights

    def average_of(self, history: Sequence[Weights], name: str) -> torch.Tensor:
        """beta^4 w_0 + (1 - beta) (beta^3 w_1 + beta^2 w_2 + beta w_3 + w_4)."""
        shares = [self.BETA**4, *((1 - self.BETA) * self.BETA ** (4 - step) for step in (1, 2, 3, 4))]
        return sum(share * weights[name].double() for share, weights in zip(shares, history, strict=True))

    @pytest.mark.parametrize("zero_stage", [0, 2, 3])
    def test_closed_form(
        self, zero_stage: int, two_ranks: RayActorGroup, material: Material, wide: Path, history: list[Weights]
    ) -> None:
        """Whatever the ZeRO stage, the average of all weights so far is saved; saving it changes no training."""
        run = f"ema-{zero_stage}"
        sections: dict[str, dict[str, Any]] = {
            "train": {"enable_ema": True, "ema_beta": self.BETA},
            "actor": {"adam": {"lr": 3e-3}},
            "ds": {"zero_stage": zero_stage},
        }
        config = job(material, run, model=wide, **sections)
        start(two_ranks, config, material)
        for step in (1, 2, 3, 4):
            train(two_ranks, [step])
            average = saved(two_ranks, material.folder / run)
        assert average.keys() == history[4].keys()
        for name, weight in average.items():
            torch.testing.assert_close(weight.double(), self.average_of(history, name), rtol=0, atol=1e-4)
        assert max((average[name] - history[4][name]).abs().max() for name in average) > 1e-3
        on_ranks(two_ranks, "save_checkpoint", "global_step4")
        kept = load_file(material.folder / run / "checkpoints/_actor/global_step4/average_ema.safetensors")
        assert all(torch.equal(kept[f"model.{name}"], weight) for name, weight in average.items())

    @pytest.mark.parametrize("options", RESUMED)
    def test_resumed_run_is_bit_identical(
        self, options: str, two_ranks: RayActorGroup, two_other_ranks: RayActorGroup, material: Material
    ) -> None:
        """Averages, and what is trained and saved with them, go on from a checkpoint to the last bit."""
        ema = {"enable_ema": True, "ema_beta": self.BETA}
        assert_resumes(two_ranks, two_other_ranks, material, f"average {options}", train=ema, **self.RESUMED[options])

    def test_checkpoint_without_average(self, two_ranks: RayActorGroup, material: Material) -> None:
        """A checkpoint of a run without an average cannot be resumed with one, and the message says so."""
        start(two_ranks, job(material, "ema-later"), material)
        train(two_ranks, [1])
        on_ranks(two_ranks, "save_checkpoint", "global_step1")
        start(two_ranks, job(material, "ema-later", train={"enable_ema": True}), material)
        for error in errors_of(two_ranks, "load_checkpoint", "global_step1"):
            assert isinstance(error, ConfigError)
            assert "has no average_ema.safetensors" in str(error)


class TestMuon:
    @pytest.mark.parametrize("zero_stage", [1, 2])
    def test_trains(
        self, zero_stage: int, two_ranks: RayActorGroup, one_rank: RayActorGroup, material: Material
    ) -> None:
        """Hidden matrices move by lr times an orthogonal one, all others as Adam moves them; two ranks do as one."""
        losses, weights = [], []
        for ranks, run in ((two_ranks, "muon-2"), (one_rank, "muon-1")):
            start(ranks, job(material, run, actor=MUON, ds={"zero_stage": zero_stage}), material)
            first = train(ranks, [1])
            weights.append(saved(ranks, material.folder / run))
            losses.append([metrics["loss"] for metrics in (*first, *train(ranks, [1, 1, 1]))])
        assert losses[0][3] < losses[0][1] < losses[0][0]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        before = load_file(material.qwen2 / "model.safetensors")
        for name, weight in before.items():
            move = weights[0][name] - weight
            if ".layers." in name and weight.ndim == 2:
                # Taller than wide counts for sqrt(height / width); five Newton-Schulz steps come near 1, not to it.
                scale = 0.02 * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                values = torch.linalg.svdvals(move) / scale
                assert values.max() < 1.3
                assert values.median() > 0.6
            else:
                # The first step of Adam is lr times the sign of the gradient.
                assert move.abs().max() == pytest.approx(1e-2, rel=0.1)

    def test_resumed_run_is_bit_identical(
        self, two_ranks: RayActorGroup, two_other_ranks: RayActorGroup, material: Material
    ) -> None:
        """Muon's momentum goes on from a checkpoint to the last bit."""
        assert_resumes(two_ranks, two_other_ranks, material, "muon-resume", actor=MUON)


def test_offloaded_optimizer_trains_the_same(two_ranks: RayActorGroup, material: Material) -> None:
    """--ds.adam_offload changes where optimizer states are, not what is trained; on CPUs they are there anyway."""
    runs = []
    for offload in (False, True):
        start(two_ranks, job(material, "offload", ds={"adam_offload": offload}), material)
        runs.append(train(two_ranks, [1, 2]))
    assert_same_training(runs[1], runs[0])


def test_whole_job(tmp_path: Path) -> None:
    """A job with adapters and an average: engines load the merged student, which the run leaves with its adapter."""
    write_inputs(tmp_path)
    changes = {"ds.lora.rank": "4", "ds.lora.alpha": "8", "train.enable_ema": "true", "train.ema_beta": "0.5"}
    done = run_job(*job_flags(tmp_path, tmp_path / "run", **changes, actor__adam__lr="1e-2"))
    assert done.returncode == 0, done.stdout
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run"))
    assert not torch.equal(merged, logits(base))
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "run" / "adapter"))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)
    assert (tmp_path / "run" / "evaluation.json").is_file()
