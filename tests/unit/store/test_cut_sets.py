"""Stores of sets that were cut at K tokens: what is incomplete, and that they are told apart from exact ones."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter, incomplete_share, summary
from openrlhf_bd.store.cut_sets import incomplete_S

MANIFEST = StoreManifest(kind="teacher", top_p=0.8, has_logprobs=True, max_candidates=2, num_prompts=1)


def sets(*masses: list[float]) -> RecordedSets:
    """Sets whose candidates have these probabilities."""
    flat = np.array([mass for each in masses for mass in each], np.float32)
    return RecordedSets(
        ids_M=np.arange(len(flat), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(each) for each in masses])]).astype(np.int64),
        neg_log_mass_S=-np.log([sum(each) for each in masses]).astype(np.float32),
        logprobs_M=np.log(flat),
    )


def write(path: Path, manifest: StoreManifest = MANIFEST) -> StoreReader:
    """One row of four states: two tokens hold .9, one holds .85, two hold .7 and two hold .5."""
    row = Rollout(
        row_id="p:0",
        prompt_ids=np.array([9], np.int32),
        response_ids=np.array([9, 9, 9, 9], np.int32),
        finish_reason="stop",
        sets=sets([0.6, 0.3], [0.85], [0.4, 0.3], [0.3, 0.2]),
    )
    with StoreWriter(path, manifest) as writer:
        writer.append([row])
    return StoreReader(path)


def test_incomplete_are_full_sets_below_p() -> None:
    """A set of fewer than K ids is whole, and so is one whose mass reaches p but for float16's rounding."""
    rounded = np.float16(-np.log(0.8)).astype(np.float32)
    found = sets([0.6, 0.3], [0.85], [0.4, 0.3], [0.4, 0.4])
    found.neg_log_mass_S[3] = max(rounded, float(-np.log(0.8))) * (1 + 2**-12)
    assert incomplete_S(found, top_p=0.8, max_candidates=2).tolist() == [False, False, True, False]


def test_share_of_a_store_at_its_p_and_below(tmp_path: Path) -> None:
    """2 of 4 sets hold less than .8; at p = .6 one of them suffices."""
    reader = write(tmp_path / "store")
    assert incomplete_share(reader, top_p=0.8) == 0.5
    assert incomplete_share(reader, top_p=0.6) == 0.25
    found = summary(reader).sets
    assert found is not None
    assert found.incomplete_share == 0.5


def test_exact_sets_have_no_share(tmp_path: Path) -> None:
    """Where sets are exact there is nothing to tell."""
    reader = write(tmp_path / "store", MANIFEST.model_copy(update={"max_candidates": None}))
    assert incomplete_share(reader, top_p=0.8) is None
    found = summary(reader).sets
    assert found is not None
    assert found.incomplete_share is None


def test_cut_and_exact_sets_are_never_mixed() -> None:
    """K belongs to the identity of a store."""
    exact = MANIFEST.model_copy(update={"max_candidates": None})
    assert MANIFEST.differences(exact) == ["max_candidates: found 2, expected None"]


def test_k_needs_sets_that_list_ids() -> None:
    """K without sets, or beside p = 1, is a mistake."""
    for top_p in (None, 1.0):
        with pytest.raises(ValidationError, match="max_candidates describes sets that list ids"):
            StoreManifest(kind="teacher", top_p=top_p, max_candidates=2, num_prompts=1)
