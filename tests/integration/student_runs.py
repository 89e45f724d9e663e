"""What tests of the student's ranks train on and how they run them: real Ray actors with DeepSpeed over gloo."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel, Qwen2Config

from openrlhf_bd.algorithms.base import StepContext
from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.config import Config
from openrlhf_bd.data.micro_batches import MicroBatch, collate
from openrlhf_bd.data.order import BlockOrder, RowOrder
from openrlhf_bd.functional.candidates import top_p_candidates
from openrlhf_bd.functional.head import DenseHead, mean_log_sum_exp
from openrlhf_bd.records import Origin, RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter
from openrlhf_bd.student.data import SHIFT_STEPS
from openrlhf_bd.student.row_source import RowStores
from openrlhf_bd.student.strategy import make_strategy
from openrlhf_bd.upstream import RayActorGroup

VOCAB, STOP, NUM_ROWS, BATCH, STEPS = 64, 1, 11, 5, 4
NUM_VALIDATION = 7
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Material:
    """What the tests train on: a store, pre-training blocks, and model folders."""

    folder: Path
    store: Path
    online: Path
    validation: Path
    pretrain: Path
    qwen2: Path
    gpt2: Path
    not_a_number: Path


def _recorded(logits_SV: Tensor) -> RecordedSets:
    sets = top_p_candidates(logits_SV, top_p=0.95, always_include=[STOP])
    assert sets.logprobs_M is not None
    return RecordedSets(
        ids_M=sets.ids_M.numpy().astype(np.int32),
        offsets=sets.offsets_S1.numpy(),
        neg_log_mass_S=sets.neg_log_mass_S.numpy(),
        logprobs_M=sets.logprobs_M.numpy(),
    )


def _rollout(row: int, generator: torch.Generator) -> Rollout:
    lengths = torch.randint(1, 9, (2,), generator=generator).tolist()
    prompt, response = (torch.randint(2, VOCAB, (n,), generator=generator).numpy().astype(np.int32) for n in lengths)
    cut = row % 3 == 0
    if not cut:
        response[-1] = STOP
    logits_SV = 3 * torch.randn(len(response) + cut, VOCAB, generator=generator)
    logprobs_SV = torch.log_softmax(logits_SV, dim=1).numpy()
    return Rollout(
        row_id=f"prompt-{row}:0",
        prompt_ids=prompt,
        response_ids=response,
        finish_reason="length" if cut else "stop",
        logprobs_T=logprobs_SV[np.arange(len(response)), response],
        sets=_recorded(logits_SV),
    )


def save_model(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def _save_broken_model(source: Path, folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = math.nan
    model.save_pretrained(folder)
    return folder


def _write_online(folder: Path, manifest: StoreManifest) -> None:
    """A store as an online run leaves it: two steps, of which every other row is the student's."""
    own, num_rows = torch.Generator().manual_seed(7), 2 * BATCH
    changes = {"online": True, "total_rows": num_rows, "num_prompts": num_rows, "sampling": {"rollout": "mixed"}}
    with StoreWriter(folder, manifest.model_copy(update=changes), rows_per_shard=BATCH) as writer:
        for row in range(num_rows):
            rollout, step = _rollout(row, own), row // BATCH + 1
            behaviour_T = -torch.rand(len(rollout.response_ids), generator=own).numpy()
            origin = Origin(step, "student", step - 1, behaviour_T) if row % 2 else Origin(step, "teacher")
            writer.append([replace(rollout, origin=origin)])


def write_material(folder: Path) -> Material:
    """A store, pre-training blocks and models, the same in every process."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    manifest = StoreManifest(
        kind="teacher", top_p=0.95, always_include=(STOP,), has_logprobs=True, num_prompts=NUM_ROWS
    )
    with StoreWriter(folder / "store", manifest, rows_per_shard=4) as writer:
        writer.append([_rollout(row, generator) for row in range(NUM_ROWS)])
    _write_online(folder / "online", manifest)
    gold = StoreManifest(kind="gold", num_prompts=NUM_VALIDATION)
    with StoreWriter(folder / "validation", gold) as writer:
        own = torch.Generator().manual_seed(6)
        writer.append([replace(_rollout(row, own), logprobs_T=None, sets=None) for row in range(NUM_VALIDATION)])
    np.save(folder / "pretrain.npy", torch.randint(0, VOCAB, (7, 12), generator=generator).numpy().astype(np.int32))
    sizes = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": STOP}
    qwen2 = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        **sizes,
    )
    qwen2_folder = save_model(qwen2, folder / "qwen2")
    return Material(
        folder=folder,
        store=folder / "store",
        online=folder / "online",
        validation=folder / "validation",
        pretrain=folder / "pretrain.npy",
        qwen2=qwen2_folder,
        gpt2=save_model(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **sizes), folder / "gpt2"),
        not_a_number=_save_broken_model(qwen2_folder, folder / "not_a_number"),
    )


def job(material: Material, run: str, model: Path | None = None, **sections: dict[str, Any]) -> Config:
    """Configuration of a short run; sections override its values."""
    values: dict[str, dict[str, Any]] = {
        "actor": {
            "model_name_or_path": str(model or material.qwen2),
            "adam": {"lr": 1e-2},
            "lr_scheduler": "constant",
            "lr_warmup_ratio": 0.0,
        },
        "train": {"batch_size": BATCH, "pretrain_batch_size": 3, "micro_batch_size": 2, "seed": 3},
        "ds": {"param_dtype": "fp32", "zero_stage": 2},
        "ckpt": {"output_dir": str(material.folder / run)},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return Config.model_validate(values)


def start(ranks: RayActorGroup, config: Config, material: Material) -> None:
    """Build model, optimizer and data anew in the ranks' processes."""
    ray.get(
        ranks.async_init_model_from_pretrained(
            make_strategy(config),
            config,
            stores=RowStores(str(material.store), validation=str(material.validation)),
            pretrain_path=str(material.pretrain),
            max_steps=STEPS,
            stop_ids=[STOP],
        ),
        timeout=120,
    )


def on_ranks(ranks: RayActorGroup, method: str, *arguments: Any) -> list[Any]:
    return list(ray.get(ranks.async_run_method(method, *arguments), timeout=120))


def train(ranks: RayActorGroup, steps: Sequence[int] = range(1, STEPS + 1)) -> list[dict[str, float]]:
    """Metrics of each step; every rank must report the same."""
    metrics = []
    for step in steps:
        first, *others = on_ranks(ranks, "train_step", step)
        assert all(other == first for other in others)
        metrics.append(
            {name: value for name, value in first.items() if not name.startswith(("time_", "tokens_per_s", "mfu"))}
        )
    return metrics


def errors_of(ranks: RayActorGroup, method: str, *arguments: Any) -> list[Exception]:
    """What each rank raised."""
    errors = []
    for ref in ranks.async_run_method(method, *arguments):
        with pytest.raises(RayTaskError) as caught:
            ray.get(ref, timeout=120)
        errors.append(caught.value.cause)
    return errors


class PlainTraining:
    """The same training in plain torch: one process, one batch a step, the model's own logits, torch's AdamW."""

    def __init__(self, config: Config, material: Material) -> None:
        load = partial(AutoModelForCausalLM.from_pretrained, attn_implementation="eager")
        self.model = load(config.actor.model_name_or_path).eval()
        self._config, self._options = config, config.algo.distill
        self._reader, self._blocks = StoreReader(material.store), np.load(material.pretrain)
        train = config.train
        self._rows = RowOrder(len(self._reader), train.batch_size, train.seed)
        self._order = BlockOrder(len(self._blocks), train.pretrain_batch_size or train.batch_size, train.seed)
        self._target = copy.deepcopy(self.model) if self._options.next_value_gradient == "target" else None
        algorithm = resolve_algorithm(self._options.name)
        self._needs = algorithm.needs_of(self._options)
        self._algorithm = algorithm(self._options, [STOP], self._shift())
        needs_teacher = self._options.kd_ratio > 0 or self._needs.live_teacher
        self._teacher = load(config.teacher.model_name_or_path).eval() if needs_teacher else None
        adam = config.actor.adam
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=adam.lr, betas=adam.betas, eps=adam.eps, weight_decay=0.0
        )

    def _batch(self, step: int) -> MicroBatch:
        rollouts = self._reader.rollouts(self._rows.rows(step))
        return collate(rollouts, layout="padded", with_sets=self._needs.candidate_sets)

    def _text(self, step: int) -> MicroBatch:
        blocks = {str(block): self._blocks[block] for block in self._order.blocks(step)}
        return collate([], blocks, layout="padded", with_sets=True)

    @torch.no_grad()
    def _shift(self) -> float:
        levels = []
        for step in range(1, SHIFT_STEPS + 1):
            batch = self._batch(step)
            levels.append(mean_log_sum_exp(dense_head(self.model, batch), batch.trajectories.has_action_S))
        return float(sum(total for total, _ in levels) / sum(count for _, count in levels))

    def _policy_loss(self, step: int) -> Tensor:
        batch = self._batch(step)
        context = StepContext(
            num_tokens=float(batch.trajectories.has_action_S.sum()),
            num_rows=float(len(batch.names)),
            step=step,
            target_head=None if self._target is None else dense_head(self._target, batch),
            teacher_head=None if self._teacher is None else self._teacher_head(batch),
        )
        return self._algorithm.loss(dense_head(self.model, batch), batch.sets, batch.trajectories, context).loss

    @torch.no_grad()
    def _teacher_head(self, batch: MicroBatch) -> DenseHead:
        assert self._teacher is not None
        return DenseHead(dense_head(self._teacher, batch).logits_SV[:, :VOCAB])

    def _text_loss(self, step: int) -> Tensor:
        text = self._text(step)
        log_student_PV = torch.log_softmax(dense_head(self.model, text).logits_SV, dim=1)
        cross_entropy = -log_student_PV.gather(1, text.target_P[:, None]).mean()
        if self._teacher is None or self._options.kd_ratio == 0:
            return cross_entropy
        with torch.no_grad():
            log_teacher_PV = torch.log_softmax(dense_head(self._teacher, text).logits_SV[:, :VOCAB], dim=1)
        kl = (log_teacher_PV.exp() * (log_teacher_PV - log_student_PV)).sum(dim=1).mean()
        return (1 - self._options.kd_ratio) * cross_entropy + self._options.kd_ratio * kl

    def step(self, step: int) -> dict[str, float]:
        """Losses and gradient norm of one step."""
        policy, ptx = self._policy_loss(step), self._text_loss(step)
        loss = policy + self._options.pretrain_coef * ptx
        self._optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([parameter.grad.double().norm() for parameter in self.model.parameters()]).norm()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.actor.max_norm)
        self._optimizer.step()
        if self._target is not None:
            decay = self._options.target_decay
            with torch.no_grad():
                for slow, fast in zip(self._target.parameters(), self.model.parameters(), strict=True):
                    slow.mul_(decay).add_(fast, alpha=1 - decay)
        values = {"loss": loss, "policy_loss": policy, "ptx_loss": ptx, "actor_grad_norm": norm}
        return {name: value.item() for name, value in values.items()}


def dense_head(model: PreTrainedModel, batch: MicroBatch) -> DenseHead:
    """The model's own logits at a batch's states."""
    output = model(batch.tokens.input_ids, attention_mask=batch.tokens.attention_mask)
    return DenseHead(output.logits.flatten(0, 1)[batch.tokens.state_index_S])


def plain_loop(config: Config, material: Material) -> tuple[list[dict[str, float]], PreTrainedModel]:
    """Metrics of each step of a plain training, and the trained model."""
    training = PlainTraining(config, material)
    return [training.step(step) for step in range(1, STEPS + 1)], training.model


def assert_same_training(found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> None:
    for step, (here, there) in enumerate(zip(found, expected, strict=True), start=1):
        for name, value in there.items():
            assert here[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), f"step {step}: {name}"
