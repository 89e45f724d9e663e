"""What a rank reads: cuts of recorded sets, counts of the global batch, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config, DistillConfig
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreWriter
from openrlhf_bd.student.data import StudentData
from openrlhf_bd.student.row_source import RowStores, SetCut, plan_cut

NEEDS = Needs(rollouts="teacher", candidate_sets=True, candidate_logprobs=True)
STOP = 1


def manifest(**changes: Any) -> StoreManifest:
    values = {"kind": "teacher", "top_p": 0.9, "always_include": (STOP,), "has_logprobs": True, "num_prompts": 4}
    return StoreManifest(**{**values, **changes})


def plan(recorded: StoreManifest, needs: Needs = NEEDS, **options: Any) -> SetCut | None:
    return plan_cut(recorded, needs, DistillConfig(**options), [STOP], store="data")


class TestCut:
    def test_sets_that_fit_are_left_alone(self) -> None:
        """Sets recorded for the same p and stop tokens are used as they are, to the last bit."""
        assert plan(manifest(), top_p=0.9) is None

    def test_smaller_p(self) -> None:
        """A store of a larger p serves a smaller one."""
        assert plan(manifest(), top_p=0.5) == SetCut(0.5, (STOP,))

    def test_without_stop_tokens(self) -> None:
        """Stop tokens that were always recorded can be left out again: `paper` runs from data of `robust`."""
        assert plan(manifest(), top_p=0.9, include_eos=False) == SetCut(0.9, ())

    def test_algorithm_without_sets_reads_any_store(self) -> None:
        """Cross-entropy does not care what sets there are."""
        assert plan(manifest(top_p=None, always_include=(), has_logprobs=False), Needs(rollouts="teacher")) is None

    @pytest.mark.parametrize(
        ("recorded", "options", "message"),
        [
            (manifest(), {"top_p": 0.95}, "was recorded at 0.9, and sets cannot grow"),
            (manifest(always_include=()), {"top_p": 0.9}, r"without the stop tokens \[1\]"),
            (manifest(has_logprobs=False), {"top_p": 0.9}, "log-probabilities were not recorded"),
            (manifest(top_p=None, always_include=(), has_logprobs=False), {}, "no candidate sets"),
            (manifest(top_p=1.0, always_include=(), has_logprobs=False), {"top_p": 0.9}, "its sets cannot be cut"),
        ],
    )
    def test_store_that_lacks_something_is_refused(
        self, recorded: StoreManifest, options: dict[str, Any], message: str
    ) -> None:
        """What the store lacks is an error that names the option to change."""
        with pytest.raises(ConfigError, match=message):
            plan(recorded, **options)

    def test_store_of_p_of_one_fits_p_of_one(self) -> None:
        """Sets without ids hold every stop token and need no cut."""
        needs = Needs(rollouts="teacher", candidate_sets=True)
        recorded = manifest(top_p=1.0, always_include=(), has_logprobs=False)
        assert plan(recorded, needs, top_p=1.0, include_eos=True) is None

    def test_cut_needs_log_probabilities(self) -> None:
        """Without log-probabilities a smaller p is refused even if the algorithm itself needs none."""
        with pytest.raises(ConfigError, match="can it be cut"):
            plan(manifest(has_logprobs=False), Needs(rollouts="teacher", candidate_sets=True), top_p=0.5)


def rollout(row: int) -> Rollout:
    """Row r: prompt of r + 1 tokens, response 5 and the stop token; two candidates of probability .6 and .35."""
    ids = np.array([5, STOP, 5, STOP], np.int32)
    return Rollout(
        row_id=f"p{row}:0",
        prompt_ids=np.arange(2, 3 + row, dtype=np.int32),
        response_ids=np.array([5, STOP], np.int32),
        finish_reason="stop",
        sets=RecordedSets(
            ids,
            np.array([0, 2, 4], np.int64),
            np.full(2, -np.log(0.95), np.float32),
            np.log(np.array([0.6, 0.35, 0.6, 0.35], np.float32)),
        ),
    )


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with StoreWriter(tmp_path / "store", manifest(always_include=())) as writer:
        writer.append([rollout(row) for row in range(4)])
    return tmp_path / "store"


def config_of(*, distill: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **other: Any) -> Config:
    options = {"top_p": 0.5, "include_eos": False} if distill is None else distill
    return Config.model_validate({"algo": {"distill": options}, "train": {"batch_size": 4, **(train or {})}, **other})


def open_data(
    store: Path, rank: int = 0, num_ranks: int = 1, config: Config | None = None, **changes: Any
) -> StudentData:
    values: dict[str, Any] = {"context_length": 64, "vocab_size": 16, "pretrain_path": None}
    values["stores"] = RowStores(str(store))
    return StudentData(
        config or config_of(),
        needs=NEEDS,
        stop_ids=[STOP],
        rank=rank,
        num_ranks=num_ranks,
        **{**values, **changes},
    )


def test_shift_looks_at_no_row_that_is_not_made_yet(store: Path, tmp_path: Path) -> None:
    """Steps that give the constant shift: 4 of a finished store, of which an online run has only its offline ones."""
    assert open_data(store).shift_steps == 4
    with StoreWriter(tmp_path / "rollouts", manifest(always_include=(), online=True, total_rows=4)) as writer:
        for offline_steps, expected in ((2, 2), (9, 4)):
            stores = RowStores(str(store), str(tmp_path / "rollouts"), offline_steps=offline_steps)
            assert open_data(store, stores=stores).shift_steps == expected
        assert open_data(store, stores=RowStores(None, str(tmp_path / "rollouts"))).shift_steps == 1
        writer.suspend()


def test_ranks_share_the_global_batch(store: Path) -> None:
    """Together the ranks read every row once, and each knows the counts of all."""
    steps = [open_data(store, rank, 3).step(1) for rank in range(3)]
    assert {(step.num_rows, step.num_tokens, step.num_prompt_tokens) for step in steps} == {(4, 8, 1 + 2 + 3 + 4)}
    assert {len(step.micro_batches) for step in steps} == {2}
    counted = [batch.names[0] for step in steps for batch in step.micro_batches if batch.weight]
    assert sorted(counted) == ["row p0:0", "row p1:0", "row p2:0", "row p3:0"]
    assert len({step.balance for step in steps}) == 1


def test_sets_are_cut_to_the_run(store: Path) -> None:
    """A run at p = .5 sees only the first candidate (.6 of the mass) of sets recorded at .9."""
    batch = open_data(store).step(1).micro_batches[0]
    assert batch.sets is not None
    assert batch.sets.ids_M.tolist() == [5, 5]


def test_blocks(store: Path, tmp_path: Path) -> None:
    """Pre-training blocks come as many as rows unless told otherwise; all positions but the first are targets."""
    np.save(tmp_path / "blocks.npy", np.full((3, 6), 7, np.int32))
    step = open_data(store, pretrain_path=str(tmp_path / "blocks.npy")).step(1)
    assert sum(batch.num_targets for batch in step.micro_batches) == step.num_targets == 4 * 5
    assert len(step.micro_batches) == 4 + 4


@pytest.mark.parametrize("packed", [False, True])
def test_block_that_comes_twice_counts_twice(store: Path, tmp_path: Path, packed: bool) -> None:
    """With 5 blocks a step of a text of 3, the two that come again in the same micro-batch are there again."""
    np.save(tmp_path / "blocks.npy", np.arange(2, 14, dtype=np.int32).reshape(3, 4))
    train = {"pretrain_batch_size": 5, "dynamic_batch_enable": True, "max_tokens_per_gpu": 1000}
    config = config_of(train=train, ds={"packing_samples": packed})
    step = open_data(store, config=config, pretrain_path=str(tmp_path / "blocks.npy")).step(1)
    [batch] = [batch for batch in step.micro_batches if batch.num_targets]
    assert batch.num_targets == step.num_targets == 5 * 3
    assert len(set(batch.names)) == (4 if packed else 0) + 5


def test_row_longer_than_the_context_is_refused(store: Path) -> None:
    """A row that the student cannot read is found before training starts."""
    with pytest.raises(DataError, match="longest row has 6 tokens, more than the student's context of 5"):
        open_data(store, context_length=5)


def test_token_outside_the_vocabulary_is_refused(store: Path) -> None:
    """A token id that the student has no logit for names the row instead of reading foreign memory."""
    with pytest.raises(DataError, match=r"row p[0-3]:0, .* id 5 is outside the student's vocabulary, expected 0 to 4"):
        open_data(store, vocab_size=5).step(1)


def test_sets_of_other_tokens_are_refused(tmp_path: Path) -> None:
    """A row whose sets were recorded for another row is refused by name when it is read."""
    rows = [replace(rollout(row), logprobs_T=np.log(np.float32([0.6, 0.35]))) for row in range(4)]
    # Id 6 with probability .6 beside sets that leave .05.
    rows[2] = replace(rows[2], response_ids=np.array([6, STOP], np.int32))
    with StoreWriter(tmp_path / "store", manifest(always_include=())) as writer:
        writer.append(rows)
    with pytest.raises(DataError, match=r"^row p2:0: its candidate sets do not belong to its tokens"):
        open_data(tmp_path / "store").step(1)


def test_set_without_a_promised_id_is_refused(tmp_path: Path) -> None:
    """Where sets are cut, an id that the manifest promises in every set and one lacks is refused by name of the row."""
    rows = [rollout(row) for row in range(4)]
    sets = rows[3].sets
    assert sets is not None
    rows[3] = replace(rows[3], sets=replace(sets, ids_M=np.array([5, STOP, 5, 7], np.int32)))
    with StoreWriter(tmp_path / "store", manifest()) as writer:
        writer.append(rows)
    distill = DistillConfig(top_p=0.5)
    with pytest.raises(DataError, match=r"^row p3:0: the candidate set of response token 1 lacks id 1"):
        open_data(tmp_path / "store", config=config_of(distill=distill.model_dump())).step(1)


def test_cut_sets_keep_the_ids_that_were_known(tmp_path: Path) -> None:
    """Sets of a server's K tokens may lack a stop token; a run at a smaller p keeps it where it is there."""
    rows = [rollout(row) for row in range(4)]
    sets = rows[3].sets
    assert sets is not None
    rows[3] = replace(rows[3], sets=replace(sets, ids_M=np.array([5, STOP, 5, 7], np.int32)))
    with StoreWriter(tmp_path / "store", manifest(top_p=0.99, max_candidates=2)) as writer:
        writer.append(rows)
    config = config_of(distill={"top_p": 0.5, "include_eos": True}, train={"micro_batch_size": 4})
    batch = open_data(tmp_path / "store", config=config).step(1).micro_batches[0]
    assert batch.sets is not None
    assert sorted(batch.sets.ids_M.tolist()) == [STOP] * 7 + [5] * 8


def test_rows_and_text_share_packed_micro_batches(store: Path, tmp_path: Path) -> None:
    """Rows of 3 to 6 tokens and blocks of 6 fill a budget of 24 together: 42 tokens in two micro-batches, not three."""
    np.save(tmp_path / "blocks.npy", np.full((3, 6), 7, np.int32))
    config = config_of(train={"dynamic_batch_enable": True, "max_tokens_per_gpu": 24}, ds={"packing_samples": True})
    step = open_data(store, config=config, pretrain_path=str(tmp_path / "blocks.npy")).step(1)
    # Rows have 3 + 4 + 5 + 6 tokens, the 4 blocks 24.
    assert sum(batch.tokens.num_positions for batch in step.micro_batches) == 18 + 24
    assert len(step.micro_batches) == step.balance.num_micro_batches == 2
    assert all(batch.num_states and batch.num_targets for batch in step.micro_batches)
    assert step.balance.padding_share == 0
    assert step.balance.fill == 42 / 48
