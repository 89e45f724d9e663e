"""The Parquet form of rollouts: columns, row groups, checks. Readable by pandas, polars and datasets as it is.

    row_id             string                 "<prompt_id>:<sample>"
    finish_reason      string                 "stop" | "length"
    prompt_length      int32                  entries of prompt_ids
    response_length    int32                  T, entries of response_ids
    num_states         int32                  S: T, or T + 1 (see RecordedSets), or 0 without sets
    token_hash         uint64                 BLAKE2b of prompt and response ids (`token_hash`)
    teacher_prompt_hash uint64                of the prompt that the teacher saw (`prompt_hash`); only in stores whose
                                              manifest has a fingerprint "teacher_prompts"
    teacher            string                 which teacher; only in stores of several: fingerprints "teacher:<name>"
    step               int32                  optimizer step whose batch the row belongs to; this and the next three
                                              only in stores of online runs (see `records.Origin`)
    source             string                 "teacher" | "student": who sampled the response
    policy_version     int32 | null           steps behind the student's weights; null in the teacher's rows
    behaviour_logprobs list<float32> | null   of each response token under what sampled it, nats; null as above
    prompt_ids         list<int32>
    response_ids       list<int32>
    response_logprobs  list<float32> | null   nats; where a teacher made or scored the rows
    set_sizes          list<int32>            S entries; the rest only in stores with candidate sets of p < 1
    set_ids            list<int32>            the sets one after another, each by descending probability
    neg_log_mass       list<float16>          S entries, nats
    set_logprobs       list<float16>          as set_ids, nats; only where the manifest says has_logprobs

float16 keeps 11 bits: a relative error of at most 2^-11 = 0.05 %, which is 0.004 nats at a log-probability of -10 and
5e-5 nats at the -log P of a set with P = 0.8; below 6e-5 the error is absolute, 3e-8 nats.

Parquet's zstd, no dictionaries (each costs a page and gains nothing on token ids), and BYTE_STREAM_SPLIT, which puts
the mostly equal upper bytes of ids and floats side by side. Pages carry checksums. A row group holds some 16 thousand
tokens, so that a random row costs a few milliseconds and not a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from openrlhf_bd.records import Origin, RecordedSets, Rollout
from openrlhf_bd.store.manifest import StoreManifest

# T response tokens of one row, S states with a set, M candidates.

GROUP_TOKENS = 16_384
# A group's candidates are bounded as well: sets can hold a whole vocabulary, and list offsets are int32.
GROUP_CANDIDATES = 1_048_576
STORE_ID_KEY = b"openrlhf_bd.store_id"


def token_hash(prompt_ids: NDArray[np.int32], response_ids: NDArray[np.int32]) -> int:
    """BLAKE2b-64 of the prompt's length (8 bytes) and of all ids (4 bytes each), little-endian, as an integer."""
    digest = hashlib.blake2b(len(prompt_ids).to_bytes(8, "little"), digest_size=8)
    digest.update(np.ascontiguousarray(prompt_ids, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(response_ids, dtype="<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")


def prompt_hash(prompt_ids: NDArray[np.int32]) -> int:
    """Hash of a prompt alone: the `token_hash` of a row without a response."""
    return token_hash(prompt_ids, np.empty(0, np.int32))


def arrow_schema(manifest: StoreManifest, store_id: str) -> pa.Schema:
    """Columns of the shards of such a store (see the top of this module)."""
    int_list, half_list = _list_of(pa.int32()), _list_of(pa.float16())
    fields = [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("response_length", pa.int32(), nullable=False),
        pa.field("num_states", pa.int32(), nullable=False),
        pa.field("token_hash", pa.uint64(), nullable=False),
        *_teacher_fields(manifest),
        *_origin_fields(manifest),
        pa.field("prompt_ids", int_list, nullable=False),
        pa.field("response_ids", int_list, nullable=False),
    ]
    if manifest.has_response_logprobs:
        fields.append(pa.field("response_logprobs", _list_of(pa.float32()), nullable=True))
    if manifest.has_sets and not manifest.has_whole_sets:
        fields += [pa.field(name, int_list, nullable=False) for name in ("set_sizes", "set_ids")]
        fields.append(pa.field("neg_log_mass", half_list, nullable=False))
    if manifest.has_logprobs:
        fields.append(pa.field("set_logprobs", half_list, nullable=False))
    return pa.schema(fields, metadata={STORE_ID_KEY: store_id.encode()})


def _teacher_fields(manifest: StoreManifest) -> Iterator[pa.Field]:
    if manifest.has_teacher_prompts:
        yield pa.field("teacher_prompt_hash", pa.uint64(), nullable=False)
    if manifest.teachers:
        yield pa.field("teacher", pa.string(), nullable=False)


def _origin_fields(manifest: StoreManifest) -> Iterator[pa.Field]:
    if manifest.online:
        yield pa.field("step", pa.int32(), nullable=False)
        yield pa.field("source", pa.string(), nullable=False)
        yield pa.field("policy_version", pa.int32(), nullable=True)
        yield pa.field("behaviour_logprobs", _list_of(pa.float32()), nullable=True)


def check_rollout(rollout: Rollout, manifest: StoreManifest) -> None:
    """Refuse a row that is malformed or not what the manifest promises.

    Raises:
        ValueError: the message names the row. A row like that is a mistake of the code that made it.
    """
    num_tokens, sets, logprobs_T = len(rollout.response_ids), rollout.sets, rollout.logprobs_T
    found: str | None = None
    if num_tokens == 0:
        found = "no response token, expected at least one"
    elif logprobs_T is not None and not manifest.has_response_logprobs:
        found = "log-probabilities, expected none in a gold store that no teacher scored"
    elif logprobs_T is not None and (len(logprobs_T) != num_tokens or np.isnan(logprobs_T).any()):
        found = f"{len(logprobs_T)} log-probabilities, expected {num_tokens} numbers"
    elif (rollout.teacher_prompt_hash is not None) != manifest.has_teacher_prompts:
        found = f"{'no ' if manifest.has_teacher_prompts else ''}hash of a teacher's prompt, unlike the manifest"
    elif rollout.teacher not in (manifest.teachers or (None,)):
        found = f"teacher {rollout.teacher!r}, expected one of {manifest.teachers or 'a store without names'}"
    elif (rollout.origin is not None) != manifest.online:
        found = f"{'no ' if manifest.online else ''}origin, though the manifest says online: {manifest.online}"
    elif rollout.origin is not None and (fault := fault_of_origin(rollout.origin, num_tokens)):
        found = fault
    elif (sets is not None) != manifest.has_sets:
        found = f"{'no ' if sets is None else ''}candidate sets, though the store's top_p is {manifest.top_p}"
    elif sets is not None and sets.is_whole != manifest.has_whole_sets:
        found = f"sets {'without' if sets.is_whole else 'with'} ids, though the store's top_p is {manifest.top_p}"
    elif sets is not None:
        found = fault_of_sets(sets, num_tokens, has_logprobs=manifest.has_logprobs)
    if found:
        raise ValueError(f"row {rollout.row_id!r}: found {found}")


def fault_of_origin(origin: Origin, num_tokens: int) -> str | None:
    """What is wrong with a row's origin, in words, or None."""
    version, logprobs_T = origin.policy_version, origin.behaviour_logprobs_T
    if origin.step < 1:
        return f"step {origin.step}, expected at least 1"
    if origin.source == "teacher":
        has_any = version is not None or logprobs_T is not None
        return "a policy version or behaviour log-probabilities in a row of the teacher" if has_any else None
    if origin.source != "student":
        return f"source {origin.source!r}, expected teacher or student"
    if version is None or not 0 <= version < origin.step:
        return f"policy version {version} in a student's row of step {origin.step}, expected 0 to {origin.step - 1}"
    if logprobs_T is None or len(logprobs_T) != num_tokens or np.isnan(logprobs_T).any():
        length = 0 if logprobs_T is None else len(logprobs_T)
        return f"{length} behaviour log-probabilities in a student's row, expected {num_tokens} numbers"
    return None


def fault_of_sets(sets: RecordedSets, num_tokens: int, *, has_logprobs: bool) -> str | None:
    """What is wrong with the shapes of a row's sets, in words, or None."""
    num_states, num_candidates = sets.num_states, len(sets.ids_M)
    if num_states not in (num_tokens, num_tokens + 1):
        return f"{num_states} candidate sets, expected {num_tokens} or {num_tokens + 1}"
    if sets.offsets[0] != 0 or sets.offsets[-1] != num_candidates or (sets.sizes_S < 0).any():
        return f"offsets of the sets that do not ascend from 0 to {num_candidates}, the number of candidates"
    if (sets.sizes_S == 0).any() and not sets.is_whole:
        return f"no ids in {int((sets.sizes_S == 0).sum())} of the sets, expected at least one in each"
    if len(sets.neg_log_mass_S) != num_states or np.isnan(sets.neg_log_mass_S).any():
        return f"{len(sets.neg_log_mass_S)} masses, expected {num_states} numbers"
    if (sets.logprobs_M is not None) != has_logprobs:
        return f"{'no ' if has_logprobs else ''}log-probabilities of the candidates, unlike the manifest's has_logprobs"
    if sets.logprobs_M is not None and (len(sets.logprobs_M) != num_candidates or np.isnan(sets.logprobs_M).any()):
        return f"{len(sets.logprobs_M)} log-probabilities of candidates, expected {num_candidates} numbers"
    return None


def write_shard(path: Path, rollouts: Sequence[Rollout], schema: pa.Schema) -> None:
    """Write rows to a Parquet file at `path`, in the given order.

    Raises:
        OSError: the disk is full or failing.
    """
    encodings = {f"{field.name}.list.element": "BYTE_STREAM_SPLIT" for field in schema if pa.types.is_list(field.type)}
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=False,
        column_encoding=encodings,
        write_page_checksum=True,
        write_statistics=False,
    ) as writer:
        for group in _row_groups(rollouts):
            table = _encode(group, schema)
            writer.write_table(table, row_group_size=len(group))


def _row_groups(rollouts: Iterable[Rollout]) -> Iterator[list[Rollout]]:
    group: list[Rollout] = []
    num_tokens = num_candidates = 0
    for rollout in rollouts:
        group.append(rollout)
        num_tokens += len(rollout.prompt_ids) + len(rollout.response_ids)
        num_candidates += len(rollout.sets.ids_M) if rollout.sets is not None else 0
        if num_tokens >= GROUP_TOKENS or num_candidates >= GROUP_CANDIDATES:
            yield group
            group, num_tokens, num_candidates = [], 0, 0
    if group:
        yield group


def _encode(rollouts: Sequence[Rollout], schema: pa.Schema) -> pa.Table:
    columns: dict[str, Sequence[Any]] = {
        "row_id": [rollout.row_id for rollout in rollouts],
        "finish_reason": [rollout.finish_reason for rollout in rollouts],
        "prompt_length": [len(rollout.prompt_ids) for rollout in rollouts],
        "response_length": [len(rollout.response_ids) for rollout in rollouts],
        "num_states": [rollout.sets.num_states if rollout.sets else 0 for rollout in rollouts],
        "token_hash": [token_hash(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts],
        "teacher_prompt_hash": [rollout.teacher_prompt_hash for rollout in rollouts],
        "teacher": [rollout.teacher for rollout in rollouts],
        **_origin_columns([rollout.origin for rollout in rollouts]),
        "prompt_ids": [rollout.prompt_ids for rollout in rollouts],
        "response_ids": [rollout.response_ids for rollout in rollouts],
        "response_logprobs": [rollout.logprobs_T for rollout in rollouts],
        "set_sizes": [rollout.sets.sizes_S if rollout.sets else None for rollout in rollouts],
        "set_ids": [rollout.sets.ids_M if rollout.sets else None for rollout in rollouts],
        "neg_log_mass": [rollout.sets.neg_log_mass_S if rollout.sets else None for rollout in rollouts],
        "set_logprobs": [rollout.sets.logprobs_M if rollout.sets else None for rollout in rollouts],
    }
    arrays = [
        _list_array(columns[field.name], field.type)
        if pa.types.is_list(field.type)
        else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _origin_columns(origins: Sequence[Origin | None]) -> dict[str, Sequence[Any]]:
    return {
        "step": [origin and origin.step for origin in origins],
        "source": [origin and origin.source for origin in origins],
        "policy_version": [origin and origin.policy_version for origin in origins],
        "behaviour_logprobs": [origin and origin.behaviour_logprobs_T for origin in origins],
    }


def _list_of(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element, nullable=False))


def _list_array(rows: Sequence[NDArray[Any] | None], list_type: pa.DataType) -> pa.ListArray:
    dtype = np.dtype(list_type.value_type.to_pandas_dtype())
    parts = [np.empty(0, dtype) if row is None else row for row in rows]
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    # Log-probabilities beyond float16's range become -inf, as probabilities of 0 are.
    with np.errstate(over="ignore"):
        values = np.concatenate(parts).astype(dtype)
    is_null = np.array([row is None for row in rows])
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(values), type=list_type, mask=pa.array(is_null) if is_null.any() else None
    )
