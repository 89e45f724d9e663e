"""How a store's writer and reader grow with the number of rows and of shards.

Rows of 16 prompt and 16 response tokens are made on the fly. "large" shards hold 2,048 rows, as an offline job seals
them; "small" ones 32, as an online run does at each optimizer step. Each line is two fresh processes, one that writes
and one that reads: memory is what a process holds beyond what it held before the store was opened (resident; of the
reader also at its peak while opening), times are CPU seconds.

PYTHONPATH=. python3 benchmarks/store_growth.py [--rows 10000 100000 1000000]
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks._measure import memory_bytes, peak_memory_bytes, reset_peak_memory
from openrlhf_bd.records import Origin, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter

NUM_TOKENS = 16
ROWS_PER_SHARD = {"large": 2048, "small": 32}
MIB = 2**20
CPU = torch.device("cpu")
# Enough for a steady state of every buffer before memory is counted.
WARM_UP_ROWS = 4096


def manifest(num_rows: int) -> StoreManifest:
    return StoreManifest(kind="teacher", num_prompts=num_rows, online=True, total_rows=num_rows)


def rows(num_rows: int) -> Iterator[Rollout]:
    ids = np.arange(NUM_TOKENS, dtype=np.int32)
    for number in range(num_rows):
        yield Rollout(f"train:{number}:0", ids, ids + number, "length", origin=Origin(1 + number // 32, "teacher"))


def write(path: Path, num_rows: int, rows_per_shard: int) -> dict[str, float]:
    """Write the store; memory is counted from its first shards on."""
    rollouts = rows(num_rows)
    with StoreWriter(path, manifest(num_rows), rows_per_shard) as writer:
        writer.append(list(islice(rollouts, min(WARM_UP_ROWS, num_rows // 2))))
        before, started = resident_bytes(), time.process_time()
        times = []
        while batch := list(islice(rollouts, rows_per_shard)):
            start = time.process_time()
            writer.append(batch)
            times.append(time.process_time() - start)
        cpu_s, memory = time.process_time() - started, resident_bytes() - before
    tenth = max(1, len(times) // 10)
    return {
        "memory": memory / MIB,
        "cpu_s": cpu_s,
        "first_ms": 1e3 * float(np.median(times[:tenth])),
        "last_ms": 1e3 * float(np.median(times[-tenth:])),
    }


def read(path: Path, num_rows: int) -> dict[str, float]:
    """Open the store, ask for rows by their ids, and read some at random."""
    random = np.random.default_rng(0)
    warm_up(path.with_name("warm_up"))
    before, started = resident_bytes(), time.process_time()
    reset_peak_memory(CPU)
    reader = StoreReader(path, cache_bytes=16 * MIB)
    open_s, peak = time.process_time() - started, peak_memory_bytes(CPU) - before
    opened = resident_bytes() - before
    numbers = random.integers(0, num_rows, 512)
    row_ids = [reader.row_ids[number] for number in numbers]
    reader.index_of(row_ids)
    started = time.process_time()
    assert np.array_equal(reader.index_of(row_ids), numbers)
    find_us = 1e6 * (time.process_time() - started) / len(row_ids)
    with_ids = resident_bytes() - before
    started = time.process_time()
    for number in numbers:
        reader.rollouts([number])
    row_ms = 1e3 * (time.process_time() - started) / len(numbers)
    return {
        "open_s": open_s,
        "opened": opened / MIB,
        "peak": peak / MIB,
        "with_ids": with_ids / MIB,
        "find_us": find_us,
        "row_ms": row_ms,
    }


def warm_up(path: Path) -> None:
    """Write and read a store of 32 rows: what the libraries load and keep is not counted."""
    write(path, 64, 32)
    reader = StoreReader(path)
    reader.index_of([reader.row_ids[0]])
    reader.rollouts([0])


def resident_bytes() -> int:
    gc.collect()
    pa.default_memory_pool().release_unused()
    return memory_bytes(CPU)


def worker(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def print_line(num_rows: int, size: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="store_growth_"))
    try:
        written = worker("write", folder / "store", num_rows, ROWS_PER_SHARD[size])
        found = worker("read", folder / "store", num_rows)
        journal = (folder / "store" / "shards.jsonl").stat().st_size / MIB
    finally:
        shutil.rmtree(folder)
    num_shards = -(-num_rows // ROWS_PER_SHARD[size])
    print(
        f"{num_rows:9,} {size:>6} {num_shards:7,} | {written['memory']:7.1f} {written['cpu_s']:7.1f} "
        f"{written['first_ms']:7.2f} {written['last_ms']:7.2f} {journal:8.1f} | {found['opened']:7.1f} "
        f"{found['with_ids']:8.1f} {found['peak']:7.1f} {found['open_s']:7.2f} {found['find_us']:7.1f} "
        f"{found['row_ms']:7.2f}",
        flush=True,
    )


def main() -> None:
    """Print a line for each number of rows and size of shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--shards", nargs="+", default=["large", "small"], choices=ROWS_PER_SHARD)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        action, path, *numbers = options.worker
        print(json.dumps({"write": write, "read": read}[action](Path(path), *map(int, numbers))))
        return
    print("                         | writer                                    | reader")
    print(
        "     rows shards  number | memory     CPU   first    last  journal "
        "|  opened with ids    peak    open    find     row"
    )
    print(
        "                         |    MiB       s  ms/shard ms/shard  MiB "
        "|     MiB      MiB     MiB       s   us/id      ms"
    )
    for num_rows in options.rows:
        for size in options.shards:
            print_line(num_rows, size)


if __name__ == "__main__":
    main()
