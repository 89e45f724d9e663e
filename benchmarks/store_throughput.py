"""Speed and size of the store: tokens/s sealed and read, bytes a response token.

Rows are random: sizes of sets from a mixture of one-token sets and a geometric tail with the given mean, ids from a
Zipf-like law over a vocabulary of 151,936, probabilities from random exponentials. Real text compresses better.

PYTHONPATH=. python3 benchmarks/store_throughput.py
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter

VOCABULARY = 151_936
ONE_TOKEN_SHARE = 0.6


def zipf_ids(random: np.random.Generator, size: int) -> NDArray[np.int32]:
    """Ids of which few are frequent, as in text."""
    return (random.zipf(1.15, size) % VOCABULARY).astype(np.int32)


def random_rows(num_rows: int, num_tokens: int, mean_size: float) -> list[Rollout]:
    """Rows with candidate sets of the given mean size."""
    random = np.random.default_rng(0)
    tail_mean = (mean_size - ONE_TOKEN_SHARE) / (1 - ONE_TOKEN_SHARE)
    rows = []
    for number in range(num_rows):
        is_one_T = random.random(num_tokens) < ONE_TOKEN_SHARE
        sizes_T = np.where(is_one_T, 1, random.geometric(1 / tail_mean, num_tokens))
        num_candidates = int(sizes_T.sum())
        sets = RecordedSets(
            ids_M=zipf_ids(random, num_candidates),
            offsets=np.concatenate([[0], np.cumsum(sizes_T)]).astype(np.int64),
            neg_log_mass_S=(0.2 * random.random(num_tokens)).astype(np.float32),
            logprobs_M=-random.exponential(1.5, num_candidates).astype(np.float32),
        )
        logprobs_T = -random.exponential(0.4, num_tokens).astype(np.float32)
        prompt_ids, response_ids = zipf_ids(random, 64), zipf_ids(random, num_tokens)
        rows.append(Rollout(f"bench:{number}:0", prompt_ids, response_ids, "stop", logprobs_T, sets))
    return rows


def without_logprobs(rows: list[Rollout]) -> Iterator[Rollout]:
    """The same rows as an algorithm that needs ids alone has them recorded."""
    for row in rows:
        assert row.sets is not None
        yield replace(row, sets=replace(row.sets, logprobs_M=None))


def measure(path: Path, rows: list[Rollout], *, has_logprobs: bool) -> str:
    """Seal the rows, read them in order and at random, and say how fast."""
    num_tokens = sum(len(row.response_ids) for row in rows)
    manifest = StoreManifest(kind="teacher", top_p=0.8, has_logprobs=has_logprobs, num_prompts=len(rows))
    start = time.monotonic()
    with StoreWriter(path, manifest) as writer:
        writer.append(rows)
    sealed_s = time.monotonic() - start

    start = time.monotonic()
    reader = StoreReader(path)
    opened_s = time.monotonic() - start
    start = time.monotonic()
    for batch in np.array_split(np.arange(len(reader)), max(len(reader) // 64, 1)):
        reader.rollouts(batch)
    in_order_s = time.monotonic() - start

    cold = StoreReader(path, cache_bytes=0)
    at_random = np.random.default_rng(1).integers(0, len(cold), 256)
    start = time.monotonic()
    for row in at_random:
        cold.rollouts([row])
    random_row_s = (time.monotonic() - start) / len(at_random)
    return (
        f"{num_tokens / sealed_s / 1e6:8.2f} {num_tokens / in_order_s / 1e6:8.2f} {random_row_s * 1e3:10.2f} "
        f"{opened_s * 1e3:8.1f} {reader.size_bytes / num_tokens:12.2f}"
    )


def main() -> None:
    """Print one line for each mean set size, with and without the candidates' log-probabilities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="rows of the store")
    parser.add_argument("--tokens", type=int, default=256, help="response tokens of each row")
    options = parser.parse_args()
    print("mean size  logprobs  sealed    read   random row     open  bytes/token")
    print("                     Mtok/s   Mtok/s  ms, uncached   ms")
    for mean_size in (2.4, 7.6):
        rows = random_rows(options.rows, options.tokens, mean_size)
        for has_logprobs in (False, True):
            folder = Path(tempfile.mkdtemp(prefix="store_throughput_"))
            try:
                chosen = rows if has_logprobs else list(without_logprobs(rows))
                print(f"{mean_size:9} {has_logprobs!s:>9} {measure(folder, chosen, has_logprobs=has_logprobs)}")
            finally:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
