"""A store with a damaged shard is mended by one command, on a real teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openrlhf_bd.store import StoreReader
from tests.integration.tiny_job import job_flags, run_job, write_inputs

pytestmark = pytest.mark.integration


def test_repair_makes_the_rows_of_a_damaged_shard_again(tmp_path: Path) -> None:
    """One flipped bit: `inspect --repair` makes that shard's rows anew, and touches no other; training would refuse."""
    write_inputs(tmp_path)
    store = tmp_path / "store"
    flags = job_flags(tmp_path, tmp_path / "run", teacher__store_path=str(store), teacher__rows_per_shard="12")
    generated = run_job(*flags, module="openrlhf_bd.cli.generate_teacher")
    assert generated.returncode == 0, generated.stdout
    row_ids = StoreReader(store).row_ids
    shards = {path.name: path.read_bytes() for path in sorted(store.glob("shard-*.parquet"))}
    assert len(shards) == 4

    damaged = bytearray(shards["shard-00001.parquet"])
    damaged[len(damaged) // 2] ^= 1
    (store / "shard-00001.parquet").write_bytes(damaged)
    found = run_job(str(store), "--verify", module="openrlhf_bd.cli.inspect_store")
    assert found.returncode == 74
    assert "shard-00001.parquet" in found.stdout
    assert "--repair" in found.stdout

    repaired = run_job(str(store), "--repair", "--verify", module="openrlhf_bd.cli.inspect_store")
    assert repaired.returncode == 0, repaired.stdout
    assert "damaged: shard-00001.parquet, 12 rows to make again" in repaired.stdout
    assert "complete, verified" in repaired.stdout
    assert StoreReader(store).row_ids == row_ids
    assert (store / "damaged" / "shard-00001.parquet.0").read_bytes() == bytes(damaged)
    for name in ("shard-00000.parquet", "shard-00002.parquet", "shard-00003.parquet"):
        assert (store / name).read_bytes() == shards[name]
    entries = json.loads((store / "manifest.json").read_text(encoding="utf-8"))["shards"]
    assert [entry["num_rows"] for entry in entries] == [12] * 4
