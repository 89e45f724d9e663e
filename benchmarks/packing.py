"""Packing: how much of what is computed is tokens, and how evenly ranks share it, for rows as long as those of Dolly.

padded to 512    every row takes 512 positions, as many rows in a micro-batch as the budget holds
padded           rows in the order drawn, as many, padded to the longest of the micro-batch
padded, sorted   ours without --ds.packing_samples: sorted by length, cut by padded tokens
packed           ours with it: one sequence of rows, spread over micro-batches and ranks by cost

used: tokens / positions computed. fill: tokens / (micro-batches * budget). imbalance: the rank with most / mean over
ranks, of tokens and of squared lengths (attention). Means over batches drawn one after another.

PYTHONPATH=. python3 benchmarks/packing.py
PYTHONPATH=. python3 benchmarks/packing.py --data dolly/train.jsonl --tokenizer gpt2
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks._lengths import MAX_TOKENS, dolly_lengths
from openrlhf_bd.data.assignment import Assignment, Balance, Layout, MicroBatchLimit, assign, balance_of

TARGET = 0.95
Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class Line:
    """Means of one way to batch.

    Attributes:
        micro_batches: of each rank.
        used: tokens / positions computed.
        fill: tokens / (micro-batches * budget).
        token_imbalance: rank with most / mean.
        square_imbalance: the same of squared lengths.
        assign_s: time to assign a step, seconds.
    """

    micro_batches: float
    used: float
    fill: float
    token_imbalance: float
    square_imbalance: float
    assign_s: float


def in_order(lengths_N: Lengths, *, num_ranks: int, rows: int) -> list[list[Assignment]]:
    """Equally many rows for each rank, cut into micro-batches of so many rows in the order drawn."""
    ranks = np.array_split(np.arange(len(lengths_N)), num_ranks)
    return [
        [Assignment(part, counts=True) for part in np.split(items, range(rows, len(items), rows))] for items in ranks
    ]


def padded_to_512(lengths_N: Lengths, num_ranks: int, budget: int) -> Balance:
    """Balance where each row takes 512 positions whatever its length."""
    balance = balance_of(*_in_order(lengths_N, num_ranks, budget))
    used = float(lengths_N.sum()) / (len(lengths_N) * MAX_TOKENS)
    return Balance(balance.num_micro_batches, 1 - used, balance.fill, balance.token_imbalance, balance.square_imbalance)


def padded(lengths_N: Lengths, num_ranks: int, budget: int) -> Balance:
    """Balance where rows in the order drawn are padded to the longest of their micro-batch."""
    return balance_of(*_in_order(lengths_N, num_ranks, budget))


def _in_order(
    lengths_N: Lengths, num_ranks: int, budget: int
) -> tuple[list[list[Assignment]], Lengths, MicroBatchLimit]:
    # A micro-batch must hold its rows even if each is as long as a row can be.
    ranks = in_order(lengths_N, num_ranks=num_ranks, rows=max(1, budget // MAX_TOKENS))
    return ranks, lengths_N, MicroBatchLimit(rows=None, tokens=budget, layout="padded")


def ours(layout: Layout) -> Callable[[Lengths, int, int], Balance]:
    """Balance of the trainer's own assignment."""

    def balance(lengths_N: Lengths, num_ranks: int, budget: int) -> Balance:
        limit = MicroBatchLimit(rows=None, tokens=budget, layout=layout)
        return balance_of(assign(lengths_N, num_ranks=num_ranks, limit=limit), lengths_N, limit)

    return balance


WAYS: dict[str, Callable[[Lengths, int, int], Balance]] = {
    "padded to 512": padded_to_512,
    "padded": padded,
    "padded, sorted": ours("padded"),
    "packed": ours("packed"),
}


def measure(
    way: Callable[[Lengths, int, int], Balance], batches: list[Lengths], *, num_ranks: int, budget: int
) -> Line:
    """Means over batches."""
    started = time.perf_counter()
    found = [way(lengths_N, num_ranks, budget) for lengths_N in batches]
    seconds = (time.perf_counter() - started) / len(batches)
    return Line(
        micro_batches=float(np.mean([balance.num_micro_batches for balance in found])),
        used=1 - float(np.mean([balance.padding_share for balance in found])),
        fill=float(np.mean([balance.fill for balance in found if balance.fill is not None])),
        token_imbalance=float(np.mean([balance.token_imbalance for balance in found])),
        square_imbalance=float(np.mean([balance.square_imbalance for balance in found])),
        assign_s=seconds,
    )


def draws(options: argparse.Namespace, num_rows: int) -> Iterator[Lengths]:
    """Lengths of the rows of one batch after another."""
    random = np.random.default_rng(options.seed)
    everything = _lengths_of(options)
    order = np.empty(0, dtype=np.int64)
    for _ in range(options.batches):
        if len(order) < num_rows:
            order = random.permutation(len(everything))
        yield everything[order[:num_rows]]
        order = order[num_rows:]


def _lengths_of(options: argparse.Namespace) -> Lengths:
    if options.lengths is not None:
        return np.loadtxt(options.lengths, dtype=np.int64, ndmin=1)
    if options.data is not None:
        return tokenised_lengths(options.data, options.tokenizer)
    prompt_N, response_N = dolly_lengths(1 << 14, options.seed)
    return prompt_N + response_N


def tokenised_lengths(path: Path, tokenizer: str) -> Lengths:
    """Lengths of Dolly's records in the wrapper of the paper, with an end-of-sequence; those over 512 are left out."""
    from transformers import AutoTokenizer

    from openrlhf_bd.data.templates import format_prompt

    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [format_prompt(record["instruction"], record["input"]) for record in records]
    encode = AutoTokenizer.from_pretrained(tokenizer)
    parts = [encode(texts, verbose=False).input_ids for texts in (prompts, [record["output"] for record in records])]
    lengths = np.array([[len(prompt), len(response) + 1] for prompt, response in zip(*parts, strict=True)])
    total = lengths.sum(axis=1)
    return total[(lengths[:, 0] <= MAX_TOKENS // 2) & (total <= MAX_TOKENS)]


def main() -> None:
    """Print one table for each batch size and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256], help="rows of a global batch")
    parser.add_argument("--budgets", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens of a micro-batch")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="ranks that share a batch")
    parser.add_argument("--batches", type=int, default=50, help="batches that a line is the mean of")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--lengths", type=Path, help="text file with one length a line, instead of Dolly's")
    parser.add_argument("--data", type=Path, help="JSON Lines with instruction, input and output; with --tokenizer")
    parser.add_argument("--tokenizer", help="name or folder of its tokenizer")
    options = parser.parse_args()
    if (options.data is None) != (options.tokenizer is None):
        parser.error("--data and --tokenizer go together")

    worst = 1.0
    for rows in options.rows:
        batches = list(draws(options, rows))
        print(f"\n{rows} rows of {np.mean(batches):.0f} tokens on average, {np.max(batches)} at most")
        print("budget  ranks  way              micro-batches    used    fill  imbalance: tokens  squares  ms a step")
        for budget in options.budgets:
            for ranks in options.ranks:
                for name, way in WAYS.items():
                    line = measure(way, batches, num_ranks=ranks, budget=budget)
                    worst = min(worst, line.used) if name == "packed" else worst
                    count, used, fill, tokens, squares, seconds = astuple(line)
                    print(
                        f"{budget:6} {ranks:6}  {name:15} {count:14.1f} {used:7.1%} {fill:7.1%} {tokens:18.3f} "
                        f"{squares:8.3f} {seconds * 1e3:10.2f}"
                    )
    print(f"\npacked: at least {worst:.1%} of the positions used (target {TARGET:.0%})")
    raise SystemExit(worst < TARGET)


if __name__ == "__main__":
    main()
