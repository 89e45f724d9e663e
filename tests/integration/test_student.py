"""The student's ranks: real Ray actors with DeepSpeed over gloo, on a tiny random model and a store written here."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig, Qwen2Config

from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.config import Config
from openrlhf_bd.data.micro_batches import collate_blocks, collate_rollouts
from openrlhf_bd.data.order import BlockOrder, RowOrder
from openrlhf_bd.errors import ConfigError, StoreError, TrainingError
from openrlhf_bd.functional.candidates import top_p_candidates
from openrlhf_bd.functional.cross_entropy import token_cross_entropy_from_logits
from openrlhf_bd.functional.head import DenseHead, mean_log_sum_exp
from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter
from openrlhf_bd.student.actor import SHIFT_BATCHES, StudentRank
from openrlhf_bd.student.strategy import make_strategy
from openrlhf_bd.upstream import RayActorGroup

pytestmark = pytest.mark.integration

VOCAB, STOP, NUM_ROWS, BATCH, STEPS = 64, 1, 11, 5, 4
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Material:
    """What the tests train on: a store, pre-training blocks, and model folders."""

    folder: Path
    store: Path
    pretrain: Path
    qwen2: Path
    gpt2: Path
    not_a_number: Path


def _recorded(num_states: int, generator: torch.Generator) -> RecordedSets:
    logits = 3 * torch.randn(num_states, VOCAB, generator=generator)
    sets = top_p_candidates(logits, top_p=0.95, always_include=[STOP])
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
    return Rollout(
        row_id=f"prompt-{row}:0",
        prompt_ids=prompt,
        response_ids=response,
        finish_reason="length" if cut else "stop",
        sets=_recorded(len(response) + cut, generator),
    )


def _save_model(config: PreTrainedConfig, folder: Path) -> Path:
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


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("student")
    generator = torch.Generator().manual_seed(5)
    manifest = StoreManifest(
        kind="teacher", top_p=0.95, always_include=(STOP,), has_logprobs=True, num_prompts=NUM_ROWS
    )
    with StoreWriter(folder / "store", manifest, rows_per_shard=4) as writer:
        writer.append([_rollout(row, generator) for row in range(NUM_ROWS)])
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
    qwen2_folder = _save_model(qwen2, folder / "qwen2")
    return Material(
        folder=folder,
        store=folder / "store",
        pretrain=folder / "pretrain.npy",
        qwen2=qwen2_folder,
        gpt2=_save_model(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **sizes), folder / "gpt2"),
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


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    # Not pytest's folder: Ray makes sockets there, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(
            address="local",
            num_cpus=16,
            num_gpus=8,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def two_ranks(cluster: None) -> RayActorGroup:
    return RayActorGroup(1, 2, StudentRank)


@pytest.fixture(scope="module")
def two_other_ranks(cluster: None) -> RayActorGroup:
    """Processes that know nothing of what the first two did."""
    return RayActorGroup(1, 2, StudentRank)


@pytest.fixture(scope="module")
def one_rank(cluster: None) -> RayActorGroup:
    return RayActorGroup(1, 1, StudentRank)


def start(ranks: RayActorGroup, config: Config, material: Material) -> None:
    """Build model, optimizer and data anew in the ranks' processes."""
    ray.get(
        ranks.async_init_model_from_pretrained(
            make_strategy(config),
            config,
            store_path=str(material.store),
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
        metrics.append({name: value for name, value in first.items() if not name.startswith(("time_", "tokens_per_s"))})
    return metrics


def plain_loop(config: Config, material: Material) -> list[dict[str, float]]:
    """The same training in plain torch: one process, one batch a step, the model's own logits, torch's AdamW."""
    model = AutoModelForCausalLM.from_pretrained(config.actor.model_name_or_path, attn_implementation="eager").eval()
    options, train_options = config.algo.distill, config.train
    reader, blocks = StoreReader(material.store), np.load(material.pretrain)
    row_order = RowOrder(len(reader), train_options.batch_size, train_options.seed)
    blocks_a_step = train_options.pretrain_batch_size or train_options.batch_size
    block_order = BlockOrder(len(blocks), blocks_a_step, train_options.seed)

    def logits_at(tokens: Any) -> torch.Tensor:
        output = model(tokens.input_ids, attention_mask=tokens.attention_mask)
        return output.logits.flatten(0, 1)[tokens.state_index_S]

    def batch_of(step: int) -> Any:
        return collate_rollouts(reader.rollouts(row_order.rows(step)), layout="padded", with_sets=True)

    with torch.no_grad():
        first = [batch_of(step) for step in range(1, SHIFT_BATCHES + 1)]
        levels = [
            mean_log_sum_exp(DenseHead(logits_at(batch.tokens)), batch.trajectories.has_action_S) for batch in first
        ]
    shift = float(sum(total for total, _ in levels) / sum(count for _, count in levels))
    algorithm = resolve_algorithm("bd")(options, [STOP], shift)
    adam = config.actor.adam
    optimizer = torch.optim.AdamW(model.parameters(), lr=adam.lr, betas=adam.betas, eps=adam.eps, weight_decay=0.0)
    metrics = []
    for step in range(1, STEPS + 1):
        batch, text = batch_of(step), collate_blocks(blocks[block_order.blocks(step)])
        num_tokens = float(batch.trajectories.has_action_S.sum())
        policy = algorithm.loss(
            DenseHead(logits_at(batch.tokens)),
            batch.sets,
            batch.trajectories,
            num_tokens=num_tokens,
            num_rows=float(len(batch.row_ids)),
        ).loss
        targets = text.target_S
        ptx, _ = token_cross_entropy_from_logits(
            logits_at(text.tokens), targets, torch.ones_like(targets, dtype=torch.bool), denominator=len(targets)
        )
        loss = policy + options.pretrain_coef * ptx
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.actor.max_norm)
        optimizer.step()
        metrics.append(
            {"loss": loss.item(), "policy_loss": policy.item(), "ptx_loss": ptx.item(), "actor_grad_norm": norm.item()}
        )
    return metrics


def assert_same_training(found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> None:
    for step, (here, there) in enumerate(zip(found, expected, strict=True), start=1):
        for name, value in there.items():
            assert here[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), f"step {step}: {name}"


@pytest.fixture(scope="module")
def expected(material: Material) -> list[dict[str, float]]:
    return plain_loop(job(material, "plain"), material)


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
    assert_same_training(train(two_ranks), plain_loop(config, material))


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
    assert_same_training(train(two_ranks), plain_loop(config, material))


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


def errors_of(ranks: RayActorGroup, method: str, *arguments: Any) -> list[Exception]:
    """What each rank raised."""
    errors = []
    for ref in ranks.async_run_method(method, *arguments):
        with pytest.raises(RayTaskError) as caught:
            ray.get(ref, timeout=120)
        errors.append(caught.value.cause)
    return errors


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
