"""Options of the training step on real ranks: live teacher, target network, packed text, and who is to blame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from student_runs import (
    STEPS,
    STOP,
    VOCAB,
    Material,
    assert_same_training,
    errors_of,
    job,
    on_ranks,
    plain_loop,
    save_model,
    start,
    train,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from openrlhf_bd.config import Config
from openrlhf_bd.data.order import BlockOrder, RowOrder
from openrlhf_bd.errors import TrainingError
from openrlhf_bd.store import StoreReader
from openrlhf_bd.upstream import RayActorGroup

pytestmark = pytest.mark.integration

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": STOP,
    "tie_word_embeddings": False,
}
PACKED = {"ds": {"packing_samples": True}, "train": {"dynamic_batch_enable": True, "max_tokens_per_gpu": 40}}


def both(*sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sections of several configurations, later values first."""
    merged: dict[str, dict[str, Any]] = {}
    for part in sections:
        for section, values in part.items():
            merged[section] = merged.get(section, {}) | dict(values)
    return merged


@pytest.fixture(scope="module")
def teacher(material: Material) -> Path:
    """A model whose vocabulary is padded further than the student's."""
    return save_model(LlamaConfig(**LLAMA, vocab_size=VOCAB + 16), material.folder / "teacher")


@pytest.fixture(scope="module")
def untied(material: Material) -> Path:
    return save_model(LlamaConfig(**LLAMA, vocab_size=VOCAB), material.folder / "untied")


LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "padded, zero 2": {},
    "packed, zero 0": both(PACKED, {"ds": {"zero_stage": 0}}),
    "packed, zero 3": both(PACKED, {"ds": {"zero_stage": 3}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_live_teacher(layout: str, teacher: Path, two_ranks: RayActorGroup, material: Material) -> None:
    """With kd_ratio J_PT has its share of KL to the teacher, whose further ids never count, as in plain torch."""
    options = {"algo": {"distill": {"kd_ratio": 0.6}}, "teacher": {"model_name_or_path": str(teacher)}}
    config = job(material, "kd", **both(LAYOUTS[layout], options))
    start(two_ranks, config, material)
    found = train(two_ranks)
    assert_same_training(found, plain_loop(config, material)[0])
    assert all(metrics["ptx_kl"] > 0 for metrics in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kd_over_the_whole_vocabulary(layout: str, teacher: Path, two_ranks: RayActorGroup, material: Material) -> None:
    """kd_support full learns from the ranks' own teacher at every state of the rows, beside kd_ratio on the text."""
    distill = {"name": "kd", "kd_support": "full", "kd_ratio": 0.6}
    options = {"algo": {"distill": distill}, "teacher": {"model_name_or_path": str(teacher)}}
    config = job(material, "full", **both(LAYOUTS[layout], options))
    start(two_ranks, config, material)
    found = train(two_ranks)
    assert_same_training(found, plain_loop(config, material)[0])
    assert all(metrics["forward_kl"] == pytest.approx(metrics["policy_loss"], rel=1e-6) for metrics in found)


TARGET = {"algo": {"distill": {"next_value_gradient": "target", "target_decay": 0.9, "alpha": 2.0}}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_target_network(layout: str, two_ranks: RayActorGroup, material: Material) -> None:
    """Next values come from a moving average of the student, under any ZeRO stage, as in plain torch."""
    config = job(material, "target", **both(LAYOUTS[layout], TARGET))
    start(two_ranks, config, material)
    assert_same_training(train(two_ranks), plain_loop(config, material)[0])


def test_target_network_matters(two_ranks: RayActorGroup, material: Material) -> None:
    """The average lags behind: the same options without it train differently."""
    start(two_ranks, job(material, "no-target", algo={"distill": {"alpha": 2.0}}), material)
    found = train(two_ranks)
    expected, _ = plain_loop(job(material, "target", **TARGET), material)
    assert abs(found[-1]["policy_loss"] - expected[-1]["policy_loss"]) > 1e-3


def test_large_embedding_under_zero_3(two_ranks: RayActorGroup, material: Material) -> None:
    """An embedding that ZeRO-3 really takes apart between its uses trains as in plain torch, tied and with averages."""
    # DeepSpeed leaves parameters of up to 100,000 elements whole.
    shape = LLAMA | {"tie_word_embeddings": True, "vocab_size": 4096}
    folder = save_model(LlamaConfig(**shape), material.folder / "large")
    config = job(material, "large", model=folder, **both(PACKED, TARGET, {"ds": {"zero_stage": 3}}))
    start(two_ranks, config, material)
    assert_same_training(train(two_ranks), plain_loop(config, material)[0])


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_sampled_tail_resumes_bit_identical(
    zero_stage: int, two_ranks: RayActorGroup, two_other_ranks: RayActorGroup, material: Material
) -> None:
    """Random tokens of the tail, metrics and target network depend on step and rank alone, so a resume repeats them."""
    sampled = {"tail_estimator": "sampled", "tail_samples": 8}
    sections = both(PACKED, {"ds": {"zero_stage": zero_stage}, "logger": {"diagnostics_steps": 3}})
    sections["algo"] = {"distill": TARGET["algo"]["distill"] | sampled}
    run = f"sampled-{zero_stage}"
    start(two_ranks, job(material, run, **sections), material)
    train(two_ranks, [1, 2])
    on_ranks(two_ranks, "save_checkpoint", "global_step2", {"step": 2})
    whole = train(two_ranks, [3, 4])
    start(two_other_ranks, job(material, run, ckpt={"load_enable": True}, **sections), material)
    on_ranks(two_other_ranks, "load_checkpoint")
    assert train(two_other_ranks, [3, 4]) == whole
    assert "entropy" in whole[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_use_and_speed_are_reported(layout: str, two_ranks: RayActorGroup, material: Material) -> None:
    """A step tells its tokens, padding, imbalance, fill under a token budget, and model FLOP utilisation."""
    options = {"algo": {"distill": {"td_warmup_steps": 4}}, "logger": {"peak_tflops": 0.5}}
    start(two_ranks, job(material, "use", **both(LAYOUTS[layout], options)), material)
    [metrics, *_] = on_ranks(two_ranks, "train_step", 1)
    rows = RowOrder(11, 5, 3).rows(1)
    reader = StoreReader(material.store)
    tokens = int(reader.prompt_lengths[rows].sum() + reader.response_lengths[rows].sum()) + 3 * 12
    assert metrics["tokens"] == tokens
    assert metrics["td_scale"] == 0.25
    assert ("fill" in metrics) == ("packed" in layout)
    assert metrics["token_imbalance"] >= 1
    assert (metrics["padding_share"] == 0) == ("packed" in layout)
    compute_s = metrics["time_forward_backward_s"] + metrics["time_optimizer_s"]
    assert metrics["tokens_per_s"] == pytest.approx(tokens / compute_s)
    assert 0 < metrics["mfu"] < 1


class Items:
    """Rows and blocks of the first step, and tokens that only one of them reads."""

    def __init__(self, config: Config, material: Material) -> None:
        reader, blocks = StoreReader(material.store), np.load(material.pretrain)
        order = RowOrder(len(reader), config.train.batch_size, config.train.seed)
        block_order = BlockOrder(len(blocks), config.train.pretrain_batch_size or 0, config.train.seed)
        rollouts = reader.rollouts(order.rows(1))
        self.rows = {
            f"row {row.row_id}": np.concatenate([row.prompt_ids, row.response_ids]).tolist() for row in rollouts
        }
        self.blocks = {f"pre-training block {block}": blocks[block].tolist() for block in block_order.blocks(1)}
        self._readers = Counter(token for ids in [*self.rows.values(), *self.blocks.values()] for token in set(ids))

    def culprit(self, kind: str) -> tuple[str, int]:
        """An item of a kind and a token that it alone reads."""
        items = self.rows if kind == "row" else self.blocks
        # The last token of an item may be read by none of its states.
        return next((name, token) for name, ids in items.items() for token in ids[:-1] if self._readers[token] == 1)


@pytest.mark.parametrize("kind", ["row", "block"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_poisoned_item_is_named_alone(
    layout: str, kind: str, untied: Path, two_ranks: RayActorGroup, material: Material
) -> None:
    """One row or block whose loss is not finite stops every rank and is named, not what shares its micro-batch."""
    config = job(material, "poison", model=untied, **both(LAYOUTS[layout], {"train": {"micro_batch_size": 8}}))
    name, token = Items(config, material).culprit(kind)
    model = AutoModelForCausalLM.from_pretrained(untied)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    folder = material.folder / "poisoned"
    model.save_pretrained(folder)
    # Before the first step the shift would already be that of a poisoned student.
    sections = both(LAYOUTS[layout], {"train": {"micro_batch_size": 8}, "algo": {"distill": {"q_shift": "max"}}})
    start(two_ranks, job(material, "poison", model=folder, **sections), material)
    for error in errors_of(two_ranks, "train_step", 1):
        assert isinstance(error, TrainingError)
        assert f"step 1: the loss is not finite in {name}. No weight was changed" in str(error)


def test_bf16_losses_are_close_to_fp32(two_ranks: RayActorGroup, material: Material) -> None:
    """bf16 parameters, with loss mathematics in fp32, give the losses of fp32 within bf16's rounding of the model."""
    losses = {}
    for param_dtype in ("fp32", "bf16"):
        start(two_ranks, job(material, param_dtype, ds={"param_dtype": param_dtype, "zero_stage": 2}), material)
        losses[param_dtype] = [metrics["loss"] for metrics in train(two_ranks)]
    # bf16 keeps 8 bits: hidden states and weights are 0.4 % off, and the loss, an average, less.
    assert losses["bf16"][0] == pytest.approx(losses["fp32"][0], rel=2e-3)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert len(losses["bf16"]) == STEPS
