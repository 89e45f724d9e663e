"""How good a demo model is, and how far its next-token distributions are from one-hot."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM

from openrlhf_bd.data.templates import format_prompt
from openrlhf_bd.demo.corpus import Record, generate_split, is_correct
from openrlhf_bd.demo.recipe import collate, encode_records

# B rows, T tokens, N response tokens, V vocabulary.

TOP_PS = (0.8, 0.95)


@torch.no_grad()
def sample_responses(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    *,
    seed: int,
    temperature: float = 1.0,
    max_new_tokens: int = 96,
    batch_size: int = 100,
) -> list[str]:
    """One response per record; greedy where the temperature is 0. Records of similar prompt length form a batch."""
    prompts = tokenizer([format_prompt(record["instruction"], record["input"]) for record in records]).input_ids
    order = sorted(range(len(records)), key=lambda index: len(prompts[index]))
    responses = [""] * len(records)
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            length = max(len(prompts[index]) for index in chosen)
            pads = [length - len(prompts[index]) for index in chosen]
            ids_BT = torch.tensor(
                [[tokenizer.pad_token_id] * pad + prompts[i] for pad, i in zip(pads, chosen, strict=True)]
            )
            mask_BT = torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads])
            sampling: dict[str, Any] = {"do_sample": False}
            if temperature > 0:
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            out_BT = model.generate(  # type: ignore[misc]
                input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=max_new_tokens, **sampling
            )
            texts = tokenizer.batch_decode(out_BT[:, length:], skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                responses[index] = text
    return responses


def accuracy_by_family(records: list[Record], responses: list[str]) -> dict[str, float]:
    """Fraction of right final answers, "all" and by family."""
    right: dict[str, list[bool]] = defaultdict(list)
    for record, response in zip(records, responses, strict=True):
        for key in ("all", record["family"]):
            right[key].append(is_correct(record, response))
    return {key: sum(values) / len(values) for key, values in sorted(right.items())}


@torch.no_grad()
def response_log_probs(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, records: list[Record]
) -> tuple[Tensor, Tensor, Tensor]:
    """Next-token log-probabilities at every token of the records' responses, end of text included.

    Returns:
        (log_probs_NV, targets_N, level_N): nats; the reference token; log-sum-exp of the logits.
    """
    log_probs, targets, levels = [], [], []
    model.eval()
    for start in range(0, len(records), 64):
        batch = collate(encode_records(records[start : start + 64], tokenizer), tokenizer.pad_token_id)
        logits_NV = model(input_ids=batch.ids_BT, use_cache=False).logits[batch.target_mask_BT].float()
        levels.append(logits_NV.logsumexp(-1))
        log_probs.append(logits_NV.log_softmax(-1))
        targets.append(batch.ids_BT.roll(-1, dims=1)[batch.target_mask_BT])
    return torch.cat(log_probs), torch.cat(targets), torch.cat(levels)


def top_p_sizes(log_probs_NV: Tensor, top_p: float) -> Tensor:
    """Size of each smallest set of most likely tokens whose probability reaches `top_p`, shape [N]."""
    sorted_NV = log_probs_NV.exp().sort(-1, descending=True).values
    return (sorted_NV.cumsum(-1) - sorted_NV < top_p).sum(-1)


def distribution_statistics(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, records: list[Record]
) -> dict[str, float]:
    """Entropy, log-sum-exp, negative log-likelihood and top-p set sizes at the tokens of the records' responses."""
    log_probs_NV, targets_N, level_N = response_log_probs(model, tokenizer, records)
    statistics = {
        "nll_per_token": -log_probs_NV.gather(1, targets_N[:, None]).mean().item(),
        "entropy_per_token": -(log_probs_NV.exp() * log_probs_NV).sum(-1).mean().item(),
        "log_sum_exp_mean": level_N.mean().item(),
        "log_sum_exp_std": level_N.std().item(),
    }
    for top_p in TOP_PS:
        sizes_N = top_p_sizes(log_probs_NV, top_p)
        statistics[f"set_size_mean_p{top_p}"] = sizes_N.float().mean().item()
        statistics[f"one_token_sets_p{top_p}"] = (sizes_N == 1).float().mean().item()
    return statistics


def measure_teacher(folder: str | Path, *, num_records: int, seed: int) -> dict[str, Any]:
    """Accuracy on test problems, sampled at temperature 1 and greedy, and statistics of the distributions."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = Qwen2ForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    records = generate_split("test", num_records, seed)
    sampled = sample_responses(model, tokenizer, records, seed=seed)
    greedy = sample_responses(model, tokenizer, records, seed=seed, temperature=0.0)
    return {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_test_records": num_records,
        "accuracy_temperature_1": accuracy_by_family(records, sampled),
        "accuracy_greedy": accuracy_by_family(records, greedy),
        "distributions": distribution_statistics(model, tokenizer, records),
    }
