"""Stores of online runs: who made each row and for which step, and readers that follow the writer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_array_equal

from openrlhf_bd.cli.inspect_store import main as inspect_main
from openrlhf_bd.cli.main import main
from openrlhf_bd.errors import StoreError
from openrlhf_bd.records import Origin, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter, summary
from openrlhf_bd.store.repair import take_out_damaged
from tests.unit.store.rows import assert_same_rollout, gold_row, teacher_manifest, teacher_row

# Two steps of two rows each: the teacher's, and the student's of these versions.
VERSIONS = {1: (None, 0), 2: (0, 1)}


def online_manifest(**changes: object) -> StoreManifest:
    return teacher_manifest(
        **({"online": True, "total_rows": 4, "num_prompts": 2, "n_samples_per_prompt": 1} | changes)
    )


def online_row(row: Rollout, step: int, version: int | None) -> Rollout:
    if version is None:
        return replace(row, origin=Origin(step, "teacher"))
    logprobs_T = -np.random.default_rng(step).random(len(row.response_ids), dtype=np.float32)
    return replace(row, origin=Origin(step, "student", version, logprobs_T))


def online_rows(step: int) -> list[Rollout]:
    """The batch of a step: prompts 1 and 0, sampled for the `step`-th time."""
    return [
        online_row(teacher_row(prompt, step - 1), step, version)
        for prompt, version in zip((1, 0), VERSIONS[step], strict=True)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with StoreWriter(tmp_path / "store", online_manifest()) as writer:
        for step in VERSIONS:
            writer.append(online_rows(step))
            writer.flush()
    return tmp_path / "store"


def test_origins_come_back(store: Path) -> None:
    """Step, source, version and behaviour log-probabilities return to the bit; the teacher's rows have neither."""
    reader = StoreReader(store)
    assert list(reader.row_ids) == ["train:0:0", "train:0:1", "train:1:0", "train:1:1"]
    assert reader.steps.tolist() == [1, 2, 1, 2]
    assert reader.steps.dtype == np.int32
    for step in VERSIONS:
        rows = online_rows(step)
        for found, expected in zip(reader.rollouts(reader.index_of(r.row_id for r in rows)), rows, strict=True):
            assert_same_rollout(found, expected)
            assert found.origin is not None
            assert expected.origin is not None
            assert (found.origin.step, found.origin.source) == (step, expected.origin.source)
            assert found.origin.policy_version == expected.origin.policy_version
            logprobs_T = expected.origin.behaviour_logprobs_T
            if logprobs_T is None:
                assert found.origin.behaviour_logprobs_T is None
            else:
                assert found.origin.behaviour_logprobs_T is not None
                assert_array_equal(found.origin.behaviour_logprobs_T, logprobs_T)
                assert found.origin.behaviour_logprobs_T.dtype == np.float32
    columns = pq.read_table(store / "shard-00000.parquet").to_pydict()
    assert columns["policy_version"] == [0, None]
    assert columns["source"] == ["student", "teacher"]


def test_rows_and_manifest_agree_about_origins(tmp_path: Path) -> None:
    """A row without an origin, with a wrong one, or with one in an offline store, is a mistake."""
    row = online_rows(2)[0]
    assert row.origin is not None
    assert row.origin.behaviour_logprobs_T is not None
    wrong = [
        (None, "no origin"),
        (Origin(0, "teacher"), "step 0, expected at least 1"),
        (Origin(2, "teacher", 1), "a policy version or behaviour log-probabilities in a row of the teacher"),
        (replace(row.origin, policy_version=None), "policy version None in a student's row of step 2, expected 0 to 1"),
        (replace(row.origin, policy_version=2), "policy version 2 in a student's row of step 2"),
        (replace(row.origin, behaviour_logprobs_T=None), "0 behaviour log-probabilities"),
        (
            replace(row.origin, behaviour_logprobs_T=row.origin.behaviour_logprobs_T[1:]),
            "4 behaviour log-probabilities in a student's row, expected 5",
        ),
    ]
    writer = StoreWriter(tmp_path / "online", online_manifest())
    for origin, finding in wrong:
        with pytest.raises(ValueError, match=finding):
            writer.append([replace(row, origin=origin)])
    writer.suspend()
    writer = StoreWriter(tmp_path / "offline", teacher_manifest())
    with pytest.raises(ValueError, match="found origin, though the manifest says online: False"):
        writer.append([row])
    writer.suspend()


def test_number_of_rows_of_an_online_store(tmp_path: Path) -> None:
    """It is what the manifest says, not prompts times samples; offline stores and gold rows have no such number."""
    assert online_manifest(total_rows=3).num_rows == 3
    for changes in ({"total_rows": None}, {"online": False}, {"kind": "gold", "top_p": None, "has_logprobs": False}):
        with pytest.raises(ValueError, match=r"expected both or neither|kind teacher|candidate sets"):
            online_manifest(**changes)
    assert online_manifest().differences(online_manifest(total_rows=5)) == ["total_rows: found 4, expected 5"]
    writer = StoreWriter(tmp_path, online_manifest())
    writer.append(online_rows(1))
    with pytest.raises(StoreError, match=r"2 rows, expected 4 \(steps of an online run over 2 prompts\)"):
        writer.close()


def test_refresh_follows_the_writer(tmp_path: Path) -> None:
    """An open reader picks up what was sealed since; rows that it had keep their numbers, new ones follow."""
    writer = StoreWriter(tmp_path, online_manifest())
    reader = StoreReader(tmp_path, require_complete=False)
    assert (len(reader), reader.refresh()) == (0, 0)
    writer.append(online_rows(1))
    assert reader.refresh() == 0
    writer.flush()
    assert reader.refresh() == 2
    assert list(reader.row_ids) == ["train:0:0", "train:1:0"]
    late = StoreReader(tmp_path, require_complete=False)
    writer.append(online_rows(2))
    writer.close()
    assert late.refresh() == 2
    # In natural order train:0:1 would come second.
    assert list(late.row_ids) == ["train:0:0", "train:1:0", "train:0:1", "train:1:1"]
    assert late.index_of(["train:1:1", "train:0:0", "train:1:1"]).tolist() == [3, 0, 3]
    assert late.steps.tolist() == [1, 1, 2, 2]
    assert late.complete
    assert_same_rollout(late.rollouts([2])[0], online_rows(2)[1])
    with pytest.raises(StoreError, match="row 'train:1:1' is not among the 2 rows"):
        reader.index_of(["train:0:0", "train:1:1"])


def test_refresh_reads_new_shards_alone(tmp_path: Path) -> None:
    """A refresh does not touch the shards that it knows: damage there does not concern it."""
    writer = StoreWriter(tmp_path, online_manifest())
    writer.append(online_rows(1))
    writer.flush()
    reader = StoreReader(tmp_path, require_complete=False)
    (tmp_path / "shard-00000.parquet").unlink()
    writer.append(online_rows(2))
    writer.flush()
    assert reader.refresh() == 2
    writer.suspend()


def test_refresh_after_a_repair_is_refused(store: Path) -> None:
    """Numbers would no longer be those of the rows."""
    reader = StoreReader(store)
    os.truncate(store / "shard-00001.parquet", 10)
    take_out_damaged(store)
    with pytest.raises(StoreError, match="repaired or replaced since it was opened; open it anew"):
        reader.refresh()


def test_summary_of_an_online_store(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of four rows are the student's: 0 (step 1 of version 0), 1 (step 2 of 0) and 0 (step 2 of 1) steps late."""
    online = summary(StoreReader(store)).online
    assert online is not None
    assert (online.num_steps, online.student_share) == (2, 0.75)
    assert online.mean_staleness == pytest.approx(1 / 3)
    assert online.max_staleness == 1
    assert inspect_main([str(store), "--rows", "4"]) == 0
    printed = capsys.readouterr().out
    assert "75.0%" in printed
    assert "mean 0.33, largest 1" in printed
    assert "train:0:1  stop  step 2 by student version 1" in printed


def test_repair_of_an_online_store_is_refused(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows cannot be made again by themselves: status 74, and nothing is changed."""
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    assert inspect_main([str(store), "--repair"]) == 74
    assert "rows of an online run were made under the student's weights" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before


def test_summary_of_an_offline_store(tmp_path: Path) -> None:
    """Offline stores have no steps."""
    with StoreWriter(tmp_path, StoreManifest(kind="gold", num_prompts=1)) as writer:
        writer.append([gold_row(0)])
    reader = StoreReader(tmp_path)
    assert summary(reader).online is None
    assert reader.steps.tolist() == [0]


def test_online_rows_survive_the_way_out_and_back(store: Path, tmp_path: Path) -> None:
    """A Hugging Face data set carries the origins."""
    assert main(["export", str(store), str(tmp_path / "data")]) == 0
    assert main(["import", str(tmp_path / "data"), str(tmp_path / "again")]) == 0
    before, after = StoreReader(store), StoreReader(tmp_path / "again")
    assert after.manifest == before.manifest
    for row, again in zip(before.rollouts(range(4)), after.rollouts(range(4)), strict=True):
        assert_same_rollout(again, row)
        assert row.origin is not None
        assert again.origin is not None
        assert again.origin.behaviour_logprobs_T is None or again.origin.behaviour_logprobs_T.dtype == np.float32
        assert replace(again.origin, behaviour_logprobs_T=None) == replace(row.origin, behaviour_logprobs_T=None)
        np.testing.assert_equal(again.origin.behaviour_logprobs_T, row.origin.behaviour_logprobs_T)
