"""What goes into a store comes out of it, and others can read the files."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter
from openrlhf_bd.store.shards import GROUP_TOKENS, token_hash
from tests.unit.store.rows import (
    assert_same_rollout,
    gold_row,
    recorded_sets,
    teacher_manifest,
    teacher_row,
    teacher_rows,
)


def write(path: Path, manifest: StoreManifest, rows: list[Rollout], rows_per_shard: int = 4) -> StoreReader:
    with StoreWriter(path, manifest, rows_per_shard) as writer:
        writer.append(rows)
    return StoreReader(path)


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    """Every array of every row returns with the same values and types, whatever the shard it is in."""
    rows = teacher_rows()
    reader = write(tmp_path, teacher_manifest(), rows, rows_per_shard=7)
    for found, expected in zip(reader.rollouts(range(20)), rows, strict=True):
        assert_same_rollout(found, expected)


def test_small_large_and_bootstrap_sets(tmp_path: Path) -> None:
    """Sets of one token, of thousands, and of the state after a cut response keep their places."""
    rows = [
        teacher_row(0, sizes=[1, 60_000, 2, 1, 1]),
        teacher_row(1, sizes=[1, 1, 1, 1, 1, 7]),
        teacher_row(2, sizes=[1], num_tokens=1),
        teacher_row(3, sizes=[1, 2], num_tokens=1),
    ]
    reader = write(tmp_path, teacher_manifest(num_prompts=4, n_samples_per_prompt=1), rows)
    assert reader.num_states.tolist() == [5, 6, 1, 2]
    for found, expected in zip(reader.rollouts(range(4)), rows, strict=True):
        assert_same_rollout(found, expected)


@pytest.mark.parametrize("sizes", [[1, 0, 2], [0, 0, 0]])
def test_set_of_no_token_is_refused(tmp_path: Path, sizes: list[int]) -> None:
    """A candidate set has at least the most probable token; one without any is a mistake of what recorded it."""
    with pytest.raises(ValueError, match=r"train:0:0.*ids"):
        write(tmp_path, teacher_manifest(), [teacher_row(0, sizes=sizes, num_tokens=3)])


def test_gold_rows_have_tokens_alone(tmp_path: Path) -> None:
    """A gold store needs neither sets nor log-probabilities, and its files have no columns for them."""
    rows = [gold_row(prompt) for prompt in range(3)]
    reader = write(tmp_path, StoreManifest(kind="gold", num_prompts=3), rows)
    for found, expected in zip(reader.rollouts([0, 1, 2]), rows, strict=True):
        assert_same_rollout(found, expected)
    columns = pd.read_parquet(tmp_path / "shard-00000.parquet").columns.tolist()
    assert columns == [
        "row_id",
        "finish_reason",
        "prompt_length",
        "response_length",
        "num_states",
        "token_hash",
        "prompt_ids",
        "response_ids",
    ]


def test_gold_rows_that_a_teacher_scored(tmp_path: Path) -> None:
    """A gold store with a top_p keeps the teacher's sets and log-probabilities as a teacher's store does."""
    rows = [teacher_row(prompt) for prompt in range(3)]
    reader = write(tmp_path, teacher_manifest(kind="gold", num_prompts=3, n_samples_per_prompt=1), rows)
    assert reader.manifest.kind == "gold"
    for found, expected in zip(reader.rollouts([0, 1, 2]), rows, strict=True):
        assert_same_rollout(found, expected)


def test_sets_without_logprobs_and_rows_without_either(tmp_path: Path) -> None:
    """Sets without candidates' log-probabilities, and a row whose sampled tokens have none, are kept as None."""
    ids = np.arange(2, dtype=np.int32)
    row = Rollout("a:0", ids, ids, "stop", None, recorded_sets([2, 1], 0, has_logprobs=False))
    other = Rollout("a:1", ids, ids, "stop", np.zeros(2, np.float32), recorded_sets([1, 1], 1, has_logprobs=False))
    reader = write(tmp_path, teacher_manifest(has_logprobs=False, num_prompts=2, n_samples_per_prompt=1), [row, other])
    for found, expected in zip(reader.rollouts([0, 1]), [row, other], strict=True):
        assert_same_rollout(found, expected)


def test_half_precision_is_as_stated(tmp_path: Path) -> None:
    """Masses and log-probabilities are within 2^-11 of their size; an impossible token stays impossible."""
    exact = np.array([-0.1, -10.0 / 3, -9.99, -17.3, -70_000.0, -np.inf], np.float32)
    sets = RecordedSets(
        ids_M=np.arange(6, dtype=np.int32),
        offsets=np.array([0, 6], np.int64),
        neg_log_mass_S=np.array([-np.log(0.81)], np.float32),
        logprobs_M=exact,
    )
    row = Rollout("a:0", np.arange(1, dtype=np.int32), np.arange(1, dtype=np.int32), "stop", None, sets)
    reader = write(tmp_path, teacher_manifest(num_prompts=1, n_samples_per_prompt=1), [row])
    found = reader.rollouts([0])[0].sets
    assert found is not None
    assert found.logprobs_M is not None
    np.testing.assert_allclose(found.logprobs_M[:4], exact[:4], rtol=2**-11)
    assert found.logprobs_M[4:].tolist() == [-np.inf, -np.inf]
    np.testing.assert_allclose(found.neg_log_mass_S, sets.neg_log_mass_S, rtol=2**-11)


def test_order_depends_on_the_ids_alone(tmp_path: Path) -> None:
    """Rows appended in any order, in shards of any size, are numbered alike: prompt by prompt, 9 before 10."""
    rows = teacher_rows(num_prompts=12)
    orders = [list(range(24)), list(reversed(range(24))), np.random.default_rng(0).permutation(24).tolist()]
    for number, order in enumerate(orders):
        path = tmp_path / str(number)
        reader = write(path, teacher_manifest(num_prompts=12), [rows[place] for place in order], 5 + number)
        assert reader.row_ids == [f"train:{prompt}:{sample}" for prompt in range(12) for sample in range(2)]
        assert_same_rollout(reader.rollouts([21])[0], rows[21])


def test_lengths_without_reading_tokens(tmp_path: Path) -> None:
    """Lengths and numbers of states are known for every row when the store is opened, in the order of the rows."""
    rows = [teacher_row(0, num_tokens=3), teacher_row(1, num_tokens=9), teacher_row(2, sizes=[1, 1, 1], num_tokens=2)]
    reader = write(tmp_path, teacher_manifest(num_prompts=3, n_samples_per_prompt=1), rows[::-1], rows_per_shard=2)
    assert reader.prompt_lengths.tolist() == [4, 4, 4]
    assert reader.response_lengths.tolist() == [3, 9, 2]
    assert reader.num_states.tolist() == [3, 9, 3]
    assert reader.cached_bytes == 0


def test_any_rows_in_any_order(tmp_path: Path) -> None:
    """Rows are returned in the order asked for, repetitions included; numbers outside the store are errors."""
    reader = write(tmp_path, teacher_manifest(), teacher_rows())
    assert [row.row_id for row in reader.rollouts([19, 0, 7, 0])] == [reader.row_ids[row] for row in (19, 0, 7, 0)]
    assert reader.rollouts([]) == []
    for outside in (-1, 20):
        with pytest.raises(IndexError, match="expected 0 to 19"):
            reader.rollouts([0, outside])


def test_cache_is_bounded(tmp_path: Path) -> None:
    """However many rows are read, decoded row groups take at most cache_bytes; results are the same."""
    num_tokens = GROUP_TOKENS // 4
    rows = [teacher_row(prompt, num_tokens=num_tokens) for prompt in range(16)]
    with StoreWriter(tmp_path, teacher_manifest(num_prompts=16, n_samples_per_prompt=1), 8) as writer:
        writer.append(rows)
    whole = StoreReader(tmp_path)
    whole.rollouts(range(16))
    small = StoreReader(tmp_path, cache_bytes=whole.cached_bytes // 2)
    for row in (0, 9, 3, 15, 6, 0):
        assert_same_rollout(small.rollouts([row])[0], rows[row])
        assert small.cached_bytes <= whole.cached_bytes // 2
    none = StoreReader(tmp_path, cache_bytes=0)
    assert_same_rollout(none.rollouts([15])[0], rows[15])
    # The last row group is kept even so: the next row is likely to be in it.
    assert 0 < none.cached_bytes < whole.cached_bytes // 2


def test_rows_do_not_keep_their_group_in_memory(tmp_path: Path) -> None:
    """A row's arrays are its own and can be changed."""
    reader = write(tmp_path, teacher_manifest(), teacher_rows())
    row = reader.rollouts([3])[0]
    row.response_ids[0] += 1
    assert row.response_ids.base is None
    assert_same_rollout(reader.rollouts([3])[0], teacher_rows()[3])


def test_scan_sees_every_row_once(tmp_path: Path) -> None:
    """`scan` yields each row of every shard exactly once."""
    reader = write(tmp_path, teacher_manifest(), teacher_rows(), rows_per_shard=3)
    assert sorted(row.row_id for rows in reader.scan() for row in rows) == sorted(reader.row_ids)


def test_pandas_reads_a_shard(tmp_path: Path) -> None:
    """A shard is plain Parquet: pandas gives the lists of the rows, and the hash can be recomputed from them."""
    rows = teacher_rows()
    write(tmp_path, teacher_manifest(), rows, rows_per_shard=20)
    frame = pd.read_parquet(tmp_path / "shard-00000.parquet")
    sets = rows[2].sets
    assert sets is not None
    assert frame["row_id"].tolist() == [row.row_id for row in rows]
    assert frame["response_ids"][2].tolist() == rows[2].response_ids.tolist()
    assert frame["set_ids"][2].tolist() == sets.ids_M.tolist()
    assert frame["set_sizes"][2].tolist() == sets.sizes_S.tolist()
    assert frame["set_logprobs"][2].dtype == np.float16
    hashes = [token_hash(prompt, ids) for prompt, ids in zip(frame["prompt_ids"], frame["response_ids"], strict=True)]
    assert hashes == frame["token_hash"].tolist()


def test_datasets_reads_a_store(tmp_path: Path) -> None:
    """`datasets` loads the shards of a store as one table."""
    rows = teacher_rows()
    write(tmp_path / "store", teacher_manifest(), rows)
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "store" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert table.num_rows == 20
    assert list(table[0]["response_ids"]) == rows[0].response_ids.tolist()


def test_token_hash_separates_prompt_and_response() -> None:
    """The hash sees where the prompt ends, and is the same on every machine."""
    ids = np.arange(6, dtype=np.int32)
    assert token_hash(ids[:2], ids[2:]) != token_hash(ids[:3], ids[3:])
    # BLAKE2b-64 of 00 * 8 and of 00000001 as 4 little-endian bytes, from an independent implementation (b2sum -l 64).
    assert token_hash(ids[:0], ids[1:2]).to_bytes(8, "little").hex() == "5771b81f7cb9a149"
