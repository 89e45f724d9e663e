"""A store becomes a Hugging Face data set and a store again without a change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from datasets import load_from_disk

from openrlhf_bd.cli.main import main
from openrlhf_bd.errors import DataError
from openrlhf_bd.records import RecordedSets
from openrlhf_bd.store import StoreReader, StoreWriter
from openrlhf_bd.store.exchange import import_dataset
from tests.unit.store.rows import assert_same_rollout, gold_row, teacher_manifest, teacher_row, teacher_rows


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with StoreWriter(tmp_path / "store", teacher_manifest(), rows_per_shard=8) as writer:
        writer.append(teacher_rows())
    return tmp_path / "store"


def test_rows_survive_the_way_out_and_back(store: Path, tmp_path: Path) -> None:
    """Export, import: the same rows, sets and manifest; the data set has one row a rollout."""
    assert main(["export", str(store), str(tmp_path / "data")]) == 0
    dataset = load_from_disk(str(tmp_path / "data"))
    assert len(dataset) == 20
    first = teacher_rows()[0]
    record = next(record for record in dataset if record["row_id"] == first.row_id)
    assert record["response_ids"] == first.response_ids.tolist()
    assert first.sets is not None
    assert record["set_ids"] == first.sets.ids_M.tolist()

    assert main(["import", str(tmp_path / "data"), str(tmp_path / "again")]) == 0
    before, after = StoreReader(store), StoreReader(tmp_path / "again")
    assert after.manifest.differences(before.manifest) == []
    for row, again in zip(before.rollouts(range(20)), after.rollouts(range(20)), strict=True):
        assert_same_rollout(row, again)


def test_gold_rows_without_sets(tmp_path: Path) -> None:
    """A store without sets and log-probabilities travels too."""
    manifest = teacher_manifest(
        kind="gold", top_p=None, always_include=(), has_logprobs=False, n_samples_per_prompt=1, num_prompts=3
    )
    with StoreWriter(tmp_path / "store", manifest) as writer:
        writer.append([gold_row(number) for number in range(3)])
    assert main(["export", str(tmp_path / "store"), str(tmp_path / "data")]) == 0
    assert main(["import", str(tmp_path / "data"), str(tmp_path / "again")]) == 0
    before, after = StoreReader(tmp_path / "store"), StoreReader(tmp_path / "again")
    for row, again in zip(before.rollouts(range(3)), after.rollouts(range(3)), strict=True):
        assert_same_rollout(row, again)


def test_rows_of_p_of_one(tmp_path: Path) -> None:
    """Sets that are the whole vocabulary, and list no ids, are whole again."""
    manifest = teacher_manifest(top_p=1.0, always_include=(), has_logprobs=False, n_samples_per_prompt=1, num_prompts=2)
    rows = [replace(teacher_row(number), sets=RecordedSets.whole(5)) for number in range(2)]
    with StoreWriter(tmp_path / "store", manifest) as writer:
        writer.append(rows)
    assert main(["export", str(tmp_path / "store"), str(tmp_path / "data")]) == 0
    assert main(["import", str(tmp_path / "data"), str(tmp_path / "again")]) == 0
    for row, again in zip(rows, StoreReader(tmp_path / "again").rollouts(range(2)), strict=True):
        assert_same_rollout(again, row)


def test_changed_tokens_are_noticed(store: Path, tmp_path: Path) -> None:
    """A row whose tokens were changed in the data set is refused by name: its sets are those of other tokens."""
    assert main(["export", str(store), str(tmp_path / "data")]) == 0
    dataset = load_from_disk(str(tmp_path / "data"))
    changed = dataset.map(
        lambda record: {"response_ids": [7, *record["response_ids"][1:]]} if record["row_id"] == "train:4:1" else {}
    )
    with pytest.raises(DataError, match="row 'train:4:1': its token ids do not give its hash"):
        import_dataset(changed, tmp_path / "again")


def test_other_data_sets_and_targets_are_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is there is not written to, and a data set without a manifest is no store."""
    (tmp_path / "there").mkdir()
    assert main(["export", str(store), str(tmp_path / "there")]) == 2
    assert "it is there already" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "there"), str(tmp_path / "again")]) == 2
    assert "no data set could be loaded" in capsys.readouterr().err
    assert main(["export", str(store), str(tmp_path / "data")]) == 0
    dataset = load_from_disk(str(tmp_path / "data"))
    dataset.info.description = "something else"
    with pytest.raises(DataError, match="holds no manifest of a store"):
        import_dataset(dataset, tmp_path / "again")
