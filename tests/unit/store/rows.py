"""Rows for the tests of the store. Every array is drawn from the row's number, so equal numbers give equal rows."""

from __future__ import annotations

import numpy as np
from numpy.testing import assert_array_equal

from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.store import StoreManifest

VOCABULARY = 50_000


def teacher_manifest(**changes: object) -> StoreManifest:
    """A manifest with sets and log-probabilities, for ten prompts and two samples unless changed."""
    fields: dict[str, object] = {
        "kind": "teacher",
        "fingerprints": {"tokenizer": "a1", "teacher": "b2"},
        "top_p": 0.8,
        "always_include": (0,),
        "has_logprobs": True,
        "sampling": {"temperature": 1.0, "seed": 42},
        "num_prompts": 10,
        "n_samples_per_prompt": 2,
    }
    return StoreManifest.model_validate(fields | changes)


def recorded_sets(sizes: list[int], seed: int, *, has_logprobs: bool = True) -> RecordedSets:
    """Sets of the given sizes. Numbers are exact in float16, so they come back as they went in."""
    random = np.random.default_rng(seed)
    num_candidates = sum(sizes)
    logprobs_M = -random.integers(0, 1024, num_candidates).astype(np.float32) / 128
    return RecordedSets(
        ids_M=random.integers(0, VOCABULARY, num_candidates).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        neg_log_mass_S=random.integers(0, 256, len(sizes)).astype(np.float32) / 1024,
        logprobs_M=logprobs_M if has_logprobs else None,
    )


def teacher_row(prompt: int, sample: int = 0, *, sizes: list[int] | None = None, num_tokens: int = 5) -> Rollout:
    """A row with sets; its response is cut where `sizes` has one more entry than tokens."""
    seed = prompt * 1000 + sample
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 6, num_tokens).tolist() if sizes is None else sizes
    return Rollout(
        row_id=f"train:{prompt}:{sample}",
        prompt_ids=random.integers(0, VOCABULARY, 4).astype(np.int32),
        response_ids=random.integers(0, VOCABULARY, num_tokens).astype(np.int32),
        finish_reason="length" if len(sizes) > num_tokens else "stop",
        logprobs_T=-random.random(num_tokens, dtype=np.float32),
        sets=recorded_sets(sizes, seed),
    )


def teacher_rows(num_prompts: int = 10, num_samples: int = 2) -> list[Rollout]:
    """The rows of a whole store, in its order."""
    return [teacher_row(prompt, sample) for prompt in range(num_prompts) for sample in range(num_samples)]


def gold_row(prompt: int) -> Rollout:
    """A row with tokens alone."""
    ids = np.arange(prompt, prompt + 6, dtype=np.int32)
    return Rollout(row_id=f"gold:{prompt}:0", prompt_ids=ids[:3], response_ids=ids[3:], finish_reason="stop")


def assert_same_rollout(found: Rollout, expected: Rollout) -> None:
    """Equal to the bit, types included."""
    assert (found.row_id, found.finish_reason) == (expected.row_id, expected.finish_reason)
    pairs = [(found.prompt_ids, expected.prompt_ids), (found.response_ids, expected.response_ids)]
    assert (found.logprobs_T is None) == (expected.logprobs_T is None)
    assert (found.sets is None) == (expected.sets is None)
    if found.logprobs_T is not None and expected.logprobs_T is not None:
        pairs.append((found.logprobs_T, expected.logprobs_T))
    if found.sets is not None and expected.sets is not None:
        pairs += [
            (found.sets.ids_M, expected.sets.ids_M),
            (found.sets.offsets, expected.sets.offsets),
            (found.sets.neg_log_mass_S, expected.sets.neg_log_mass_S),
        ]
        assert (found.sets.logprobs_M is None) == (expected.sets.logprobs_M is None)
        if found.sets.logprobs_M is not None and expected.sets.logprobs_M is not None:
            pairs.append((found.sets.logprobs_M, expected.sets.logprobs_M))
    for found_array, expected_array in pairs:
        assert found_array.dtype == expected_array.dtype
        assert_array_equal(found_array, expected_array)
