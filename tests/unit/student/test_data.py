"""What a rank reads: cuts of recorded sets, counts of the global batch, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config, DistillConfig
from openrlhf_bd.data.micro_batches import MicroBatch
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreWriter
from openrlhf_bd.student.data import SetCut, StudentData, plan_cut

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
        ],
    )
    def test_store_that_lacks_something_is_refused(
        self, recorded: StoreManifest, options: dict[str, Any], message: str
    ) -> None:
        """What the store lacks is an error that names the option to change."""
        with pytest.raises(ConfigError, match=message):
            plan(recorded, **options)

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


def open_data(store: Path, rank: int = 0, num_ranks: int = 1, **changes: Any) -> StudentData:
    distill = {"top_p": 0.5, "include_eos": False}
    config = Config.model_validate({"algo": {"distill": distill}, "train": {"batch_size": 4, "micro_batch_size": 1}})
    values: dict[str, Any] = {"context_length": 64, "vocab_size": 16, "pretrain_path": None}
    return StudentData(
        config,
        store_path=str(store),
        needs=NEEDS,
        stop_ids=[STOP],
        rank=rank,
        num_ranks=num_ranks,
        **{**values, **changes},
    )


def test_ranks_share_the_global_batch(store: Path) -> None:
    """Together the ranks read every row once, and each knows the counts of all."""
    steps = [open_data(store, rank, 3).step(1) for rank in range(3)]
    assert {(step.num_rows, step.num_tokens, step.num_prompt_tokens) for step in steps} == {(4, 8, 1 + 2 + 3 + 4)}
    assert {len(step.rollouts) for step in steps} == {2}
    counted = [part.names[0] for step in steps for part in step.rollouts if part.weight]
    assert sorted(counted) == ["p0:0", "p1:0", "p2:0", "p3:0"]


def test_sets_are_cut_to_the_run(store: Path) -> None:
    """A run at p = .5 sees only the first candidate (.6 of the mass) of sets recorded at .9."""
    batch = open_data(store).step(1).rollouts[0].batch
    assert isinstance(batch, MicroBatch)
    assert batch.sets is not None
    assert batch.sets.ids_M.tolist() == [5, 5]


def test_blocks(store: Path, tmp_path: Path) -> None:
    """Pre-training blocks come as many as rows unless told otherwise; all positions but the first are targets."""
    np.save(tmp_path / "blocks.npy", np.full((3, 6), 7, np.int32))
    step = open_data(store, pretrain_path=str(tmp_path / "blocks.npy")).step(1)
    assert (len(step.pretrain), step.num_targets) == (4, 4 * 5)


def test_row_longer_than_the_context_is_refused(store: Path) -> None:
    """A row that the student cannot read is found before training starts."""
    with pytest.raises(DataError, match="longest row has 6 tokens, more than the student's context of 5"):
        open_data(store, context_length=5)


def test_token_outside_the_vocabulary_is_refused(store: Path) -> None:
    """A token id that the student has no logit for names the row instead of reading foreign memory."""
    with pytest.raises(DataError, match="rows p3:0: token id 5 is outside the student's vocabulary of 5"):
        open_data(store, vocab_size=5).step(1)
