"""The numbers about a store, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter, one_token_share, summary
from tests.unit.store.rows import assert_same_rollout, gold_row, teacher_manifest


def hand_made_rows() -> list[Rollout]:
    """Two rows: one ends by a stop token after two, one is cut after one and has the set of the state after it."""
    prompt_ids = np.array([9, 9, 9], np.int32)
    stopped = Rollout(
        row_id="a:0",
        prompt_ids=prompt_ids,
        response_ids=np.array([5, 7], np.int32),
        finish_reason="stop",
        sets=RecordedSets(
            ids_M=np.array([5, 6, 4, 3], np.int32),  # {5} and {6, 4, 3}: token 7 is outside its set
            offsets=np.array([0, 1, 4], np.int64),
            neg_log_mass_S=np.array([0.0, math.log(4 / 3)], np.float32),
            logprobs_M=np.log(np.array([1.0, 0.5, 0.125, 0.125], np.float32)),
        ),
    )
    cut = Rollout(
        row_id="b:0",
        prompt_ids=prompt_ids[:1],
        response_ids=np.array([2], np.int32),
        finish_reason="length",
        sets=RecordedSets(
            ids_M=np.array([1, 2, 8], np.int32),  # {1, 2} and, after the cut, {8}
            offsets=np.array([0, 2, 3], np.int64),
            neg_log_mass_S=np.array([0.0, math.log(2)], np.float32),
            logprobs_M=np.log(np.array([0.5, 0.5, 0.5], np.float32)),
        ),
    )
    return [stopped, cut]


def test_summary_of_hand_made_rows(tmp_path: Path) -> None:
    """Every number of the summary is what its definition gives for two small rows."""
    with StoreWriter(tmp_path, teacher_manifest(num_prompts=2, n_samples_per_prompt=1)) as writer:
        writer.append(hand_made_rows())
    reader = StoreReader(tmp_path)
    found = summary(reader)
    assert (found.num_rows, found.num_prompt_tokens, found.num_response_tokens) == (2, 4, 3)
    assert found.size_bytes == (tmp_path / "shard-00000.parquet").stat().st_size
    assert found.bytes_per_token == found.size_bytes / 3
    assert found.mean_response_length == 1.5
    assert found.response_length_quantiles == {0.5: 1, 0.9: 2, 0.99: 2, 1.0: 2}
    assert found.finish_reasons == {"length": 1, "stop": 1}
    sets = found.sets
    assert sets is not None
    # Sizes 1, 3, 2, 1.
    assert (sets.num_states, sets.num_candidates, sets.mean_size) == (4, 7, 7 / 4)
    assert sets.size_quantiles == {0.5: 1, 0.9: 3, 0.99: 3, 1.0: 3}
    assert sets.size_histogram == [(1, 1, 2), (2, 2, 1), (3, 4, 1)]
    assert sets.one_token_share == 0.5
    assert sets.mean_mass == pytest.approx((1 + 3 / 4 + 1 + 1 / 2) / 4, rel=1e-3)  # float16 on disk
    assert sets.out_of_set_rate == pytest.approx(1 / 3)  # 7, of the tokens 5, 7 and 2
    assert sets.sorted_mass is not None
    # Most probable: 1, 1/2, 1/2, 1/2; second: -, 1/8, 1/2, -; third: -, 1/8, -, -.
    first, second, third = 2.5 / 4, 0.625 / 4, 0.125 / 4
    assert sets.sorted_mass[:4] == pytest.approx([first, first + second, *[first + second + third] * 2], rel=1e-3)
    assert len(sets.sorted_mass) == 50


def test_one_token_share(tmp_path: Path) -> None:
    """As recorded: sizes 1, 3, 2, 1. Cut to p = 0.4 the first token is enough in each; to 0.6 in none but those."""
    with StoreWriter(tmp_path, teacher_manifest(num_prompts=2, n_samples_per_prompt=1)) as writer:
        writer.append(hand_made_rows())
    reader = StoreReader(tmp_path)
    assert one_token_share(reader, top_p=0.8) == 0.5
    assert one_token_share(reader, top_p=0.4) == 1.0
    assert one_token_share(reader, top_p=0.6) == 0.5
    # A set whose second token is always there keeps it.
    assert one_token_share(reader, top_p=0.4, always_include=(2,)) == 0.75
    assert one_token_share(reader, top_p=0.4, always_include=(1,)) == 1.0


def test_one_token_share_of_cut_sets(tmp_path: Path) -> None:
    """An always-included id that a server did not tell is not in a cut set, which is a single token without it.

    Sets {5}, {6, 4, 3}, {1, 2}, {8}; p = 0.4 leaves the first token, and 3 where it was told: 3 of 4 are single.
    """
    manifest = teacher_manifest(num_prompts=2, n_samples_per_prompt=1, max_candidates=3, always_include=(3,))
    with StoreWriter(tmp_path, manifest) as writer:
        writer.append(hand_made_rows())
    assert one_token_share(StoreReader(tmp_path), top_p=0.4, always_include=(3,)) == 0.75


def test_store_of_p_of_one(tmp_path: Path) -> None:
    """No column of sets is written, rows come back with whole sets, and there are no sizes to sum up."""
    rows = [replace(row, sets=RecordedSets.whole(2)) for row in hand_made_rows()]
    manifest = teacher_manifest(num_prompts=2, n_samples_per_prompt=1, top_p=1.0, always_include=(), has_logprobs=False)
    with StoreWriter(tmp_path, manifest) as writer:
        writer.append(rows)
    columns = pq.read_schema(tmp_path / "shard-00000.parquet").names
    assert not {"set_sizes", "set_ids", "neg_log_mass", "set_logprobs"} & set(columns)
    reader = StoreReader(tmp_path)
    for found, expected in zip(reader.rollouts([0, 1]), rows, strict=True):
        assert_same_rollout(found, expected)
        assert found.sets is not None
        assert found.sets.is_whole
    found = summary(reader)
    assert found.sets is None
    assert found.num_states == 4
    assert one_token_share(reader, top_p=1.0) is None


def test_rows_that_do_not_fit_the_top_p_of_their_store(tmp_path: Path) -> None:
    """Ids in a store of p = 1, and no ids in one of a smaller p, are mistakes."""
    manifest = {"num_prompts": 2, "n_samples_per_prompt": 1, "always_include": (), "has_logprobs": False}
    (row, _) = hand_made_rows()
    assert row.sets is not None
    listed = replace(row, sets=replace(row.sets, logprobs_M=None))
    with StoreWriter(tmp_path / "a", teacher_manifest(top_p=1.0, **manifest)) as writer:
        with pytest.raises(ValueError, match=r"found sets with ids, though the store's top_p is 1\.0"):
            writer.append([listed])
        writer.suspend()
    with StoreWriter(tmp_path / "b", teacher_manifest(top_p=0.8, **manifest)) as writer:
        with pytest.raises(ValueError, match=r"found sets without ids, though the store's top_p is 0\.8"):
            writer.append([replace(row, sets=RecordedSets.whole(2))])
        writer.suspend()


def test_manifest_of_p_of_one_says_nothing_of_ids() -> None:
    """Always-included ids and log-probabilities of candidates have no meaning where no ids are stored."""
    with pytest.raises(ValueError, match="sets of top_p 1 list no ids"):
        teacher_manifest(top_p=1.0)


def test_summary_of_gold_rows(tmp_path: Path) -> None:
    """A store without sets has no set statistics, and all the others."""
    with StoreWriter(tmp_path, StoreManifest(kind="gold", num_prompts=2)) as writer:
        writer.append([gold_row(0), gold_row(1)])
    found = summary(StoreReader(tmp_path))
    assert found.sets is None
    assert found.mean_response_length == 3


def test_summary_of_nothing(tmp_path: Path) -> None:
    """A store that has no row yet has counts of zero and means that are no numbers."""
    StoreWriter(tmp_path, teacher_manifest()).suspend()
    found = summary(StoreReader(tmp_path, require_complete=False))
    assert found.num_rows == 0
    assert math.isnan(found.bytes_per_token)
    assert found.sets is not None
    assert found.sets.size_histogram == []
    assert math.isnan(found.sets.mean_mass)
