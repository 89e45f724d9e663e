"""Speed and size of the store: tokens/s sealed and read, bytes a response token; beside it the K largest of each token.

Rows are random: sizes of sets from a mixture of one-token sets and a geometric tail with the given mean, ids from a
Zipf-like law over a vocabulary of 151,936, probabilities from random exponentials. Real text compresses better.

The alternative is what tools with a fixed K keep: of every position K ids (int32) and K logits (float16; bfloat16
takes as much), as dense arrays in flat files or in Parquet with the store's own compression. It holds nothing else:
no tokens, hashes or checksums, which the store has. With a fixed K a set of p needs K at least as large as it is.

PYTHONPATH=. python3 benchmarks/store_throughput.py
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter

VOCABULARY = 151_936
TOP_KS = (64, 128)
# Of the alternative, whose arrays are large; its bytes and speed a token do not depend on it.
DENSE_TOKENS = 131_072
DENSE_GROUP_TOKENS = 8_192
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


@dataclass(frozen=True)
class DenseTopK:
    """The K most likely tokens of N positions."""

    ids_NK: NDArray[np.int32]
    logits_NK: NDArray[np.float16]

    def equals(self, other: DenseTopK) -> bool:
        return np.array_equal(self.ids_NK, other.ids_NK) and np.array_equal(self.logits_NK, other.logits_NK)


def random_top_k(num_tokens: int, top_k: int) -> DenseTopK:
    """Ids as in the rows; logits descending, spread as the largest of normal ones are."""
    random = np.random.default_rng(0)
    gaps_NK = random.exponential(1 / np.arange(1, top_k + 1), (num_tokens, top_k))
    logits_NK = (random.normal(20, 3, (num_tokens, 1)) - np.cumsum(gaps_NK, axis=1)).astype(np.float16)
    return DenseTopK(zipf_ids(random, num_tokens * top_k).reshape(num_tokens, top_k), logits_NK)


def write_flat(folder: Path, dense: DenseTopK) -> None:
    """One file an array, as it lies in memory, on the disk before this returns."""
    for name, array in (("ids", dense.ids_NK), ("logits", dense.logits_NK)):
        with (folder / name).open("wb") as file:
            array.tofile(file)
            os.fsync(file.fileno())


def read_flat(folder: Path, top_k: int) -> DenseTopK:
    """The arrays of write_flat."""
    ids_NK = np.fromfile(folder / "ids", np.int32).reshape(-1, top_k)
    return DenseTopK(ids_NK, np.fromfile(folder / "logits", np.float16).reshape(-1, top_k))


def write_parquet(folder: Path, dense: DenseTopK) -> None:
    """One position a row, encoded as the store encodes its lists, on the disk before this returns."""
    top_k = dense.ids_NK.shape[1]
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), top_k) for array in (dense.ids_NK, dense.logits_NK)
    ]
    table = pa.Table.from_arrays(arrays, names=["ids", "logits"])
    with (folder / "top_k.parquet").open("wb") as file:
        pq.write_table(
            table,
            file,
            compression="zstd",
            use_dictionary=False,
            column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in table.column_names},
            write_page_checksum=True,
            write_statistics=False,
            row_group_size=DENSE_GROUP_TOKENS,
        )
        file.flush()
        os.fsync(file.fileno())


def read_parquet(folder: Path, top_k: int) -> DenseTopK:
    """The arrays of write_parquet."""
    file = pq.ParquetFile(folder / "top_k.parquet", page_checksum_verification=True)
    groups = [file.read_row_group(group) for group in range(file.num_row_groups)]
    ids, logits = (
        np.concatenate([chunk.flatten().to_numpy() for group in groups for chunk in group[name].chunks])
        for name in ("ids", "logits")
    )
    return DenseTopK(ids.reshape(-1, top_k), logits.reshape(-1, top_k))


def measure_dense(
    dense: DenseTopK, write: Callable[[Path, DenseTopK], None], read: Callable[[Path, int], DenseTopK]
) -> str:
    """Write and read the arrays, and say how fast; what is read must be what was written."""
    num_tokens, top_k = dense.ids_NK.shape
    folder = Path(tempfile.mkdtemp(prefix="store_throughput_"))
    try:
        start = time.monotonic()
        write(folder, dense)
        written_s = time.monotonic() - start
        start = time.monotonic()
        found = read(folder, top_k)
        read_s = time.monotonic() - start
        if not found.equals(dense):
            raise RuntimeError("the arrays that were read are not those that were written")
        size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    finally:
        shutil.rmtree(folder)
    return f"{num_tokens / written_s / 1e6:8.2f} {num_tokens / read_s / 1e6:8.2f} {size_bytes / num_tokens:12.2f}"


def main() -> None:
    """Print one line for each mean set size, with and without log-probabilities of candidates, and for each K."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="rows of the store")
    parser.add_argument("--tokens", type=int, default=256, help="response tokens of each row")
    options = parser.parse_args()
    # One core: Arrow would decode columns side by side.
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
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
    print("\nfixed K   form     written    read   bytes/token")
    for top_k in TOP_KS:
        dense = random_top_k(min(options.rows * options.tokens, DENSE_TOKENS), top_k)
        print(f"{top_k:7}   flat    {measure_dense(dense, write_flat, read_flat)}")
        print(f"{top_k:7}   parquet {measure_dense(dense, write_parquet, read_parquet)}")


if __name__ == "__main__":
    main()
