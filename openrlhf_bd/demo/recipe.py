"""How the shipped teacher was trained: fresh examples at every step, cross-entropy of the response, a small z-loss.

`scripts/make_demo_teacher.py` runs this to the end; a unit test runs the first steps and compares their losses.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from openrlhf_bd.data.templates import format_prompt
from openrlhf_bd.demo.corpus import Record, generate_split

# B rows, T tokens of a row, N response tokens of a batch, V vocabulary.

# Batches are cut from a pool of this many after sorting it by length, so little of a batch is padding.
BATCHES_PER_POOL = 32


@dataclass(frozen=True)
class Recipe:
    """The choices of a training run.

    Attributes:
        num_steps: optimizer steps of the whole run; the learning rate reaches its floor there.
        batch_size: rows of one step.
        learning_rate: peak of AdamW's learning rate.
        warmup_steps: steps of linear increase before the cosine.
        final_fraction: learning rate at the end over its peak.
        weight_decay: of matrices; vectors have none.
        max_grad_norm: gradients are scaled down to this norm.
        z_loss: weight of the squared log-sum-exp of the logits.
        seed: of the weights and of the examples.
    """

    num_steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    final_fraction: float = 0.01
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    z_loss: float = 5e-3
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Rows padded at their end. `target_mask_BT` is true where the *next* token is a response token or end of text."""

    ids_BT: Tensor
    target_mask_BT: Tensor


def encode_records(records: list[Record], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], int]]:
    """Token ids of prompt, response and end of text, and the number of prompt tokens, for each record."""
    prompts = tokenizer([format_prompt(record["instruction"], record["input"]) for record in records]).input_ids
    responses = tokenizer([record["output"] for record in records]).input_ids
    return [
        (prompt + response + [tokenizer.eos_token_id], len(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def collate(rows: list[tuple[list[int], int]], pad_id: int) -> Batch:
    """Pad rows at their end to the longest of them."""
    length = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), length), pad_id, dtype=torch.long)
    target_mask_BT = torch.zeros((len(rows), length), dtype=torch.bool)
    for row, (ids, num_prompt) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        target_mask_BT[row, num_prompt - 1 : len(ids) - 1] = True
    return Batch(ids_BT, target_mask_BT)


def iter_batches(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, start_step: int = 0) -> Iterator[Batch]:
    """Endless batches of fresh train-split examples; step k always gets the same batch.

    Args:
        recipe: batch size and seed.
        tokenizer: of the teacher.
        start_step: the step to begin with, as after a restart.
    """
    pool, skip = divmod(start_step, BATCHES_PER_POOL)
    while True:
        records = generate_split("train", recipe.batch_size * BATCHES_PER_POOL, seed=f"teacher:{recipe.seed}:{pool}")
        rows = sorted(encode_records(records, tokenizer), key=lambda row: len(row[0]))
        groups = [rows[i : i + recipe.batch_size] for i in range(0, len(rows), recipe.batch_size)]
        Random(f"order:{recipe.seed}:{pool}").shuffle(groups)
        yield from (collate(group, tokenizer.pad_token_id) for group in groups[skip:])
        pool, skip = pool + 1, 0


def response_loss(model: Qwen2ForCausalLM, batch: Batch, z_loss: float) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the response tokens, and the same plus `z_loss` times the mean squared log-sum-exp.

    Padding is at the end and attention is causal, so no attention mask is needed. Logits are computed only where
    they are targets.

    Returns:
        (objective, cross_entropy): nats per token, gradient flows through the first.
    """
    hidden_BTD = model.model(input_ids=batch.ids_BT, use_cache=False).last_hidden_state
    targets_N = batch.ids_BT.roll(-1, dims=1)[batch.target_mask_BT]
    logits_NV = model.lm_head(hidden_BTD[batch.target_mask_BT])
    level_N = logits_NV.logsumexp(dim=-1)
    cross_entropy = (level_N - logits_NV.gather(1, targets_N[:, None])[:, 0]).mean()
    return cross_entropy + z_loss * level_N.square().mean(), cross_entropy.detach()


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from the peak to `final_fraction` of it. `step` counts from 0."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return recipe.learning_rate * (recipe.final_fraction + (1 - recipe.final_fraction) * cosine)


def make_optimizer(model: Qwen2ForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), eps=1e-8)


def train_steps(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.AdamW,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    start_step: int = 0,
) -> Iterator[dict[str, float]]:
    """Train, and yield a row after each step: step, loss (nats per response token), learning rate, gradient norm.

    Args:
        model: changed in place.
        optimizer: from `make_optimizer`, or loaded from a checkpoint.
        tokenizer: of the teacher.
        recipe: the choices of the run.
        start_step: number of steps already done.

    Raises:
        FloatingPointError: a loss is not finite. It is raised before the optimizer's step, so the weights are whole.
    """
    model.train()
    batches = iter_batches(recipe, tokenizer, start_step)
    for step in range(start_step, recipe.num_steps):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        objective, loss = response_loss(model, batch, recipe.z_loss)
        if not torch.isfinite(objective):
            raise FloatingPointError(f"step {step}: loss is {loss.item()}; lower the learning rate or clip harder")
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        yield {
            "step": step,
            "loss": loss.item(),
            "learning_rate": learning_rate_at(step, recipe),
            "grad_norm": norm.item(),
        }
