"""A store as a Hugging Face data set, and back. The rows are the same; the manifest travels in the description.

A store's shards are Parquet files, and `datasets.load_dataset("parquet", data_files=...)` reads them as they are. This
is for publishing rows and for getting them back: one row a rollout, with the columns of `shards`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from openrlhf_bd.errors import DataError, RunFolderError
from openrlhf_bd.records import Origin, RecordedSets, Rollout
from openrlhf_bd.store.folder import StorePath
from openrlhf_bd.store.manifest import StoreManifest
from openrlhf_bd.store.reader import StoreReader
from openrlhf_bd.store.shards import token_hash
from openrlhf_bd.store.writer import StoreWriter

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_ROWS = 256
MANIFEST_KEY = "openrlhf_bd_manifest"


def export_dataset(store: StorePath, target: Path) -> int:
    """Write a store as a data set folder, for `datasets.load_from_disk` or `push_to_hub`.

    Args:
        store: folder of a complete store.
        target: folder to make.

    Returns:
        Rows written.

    Raises:
        StoreError: the store is damaged or unfinished.
        RunFolderError: the target is there already.
    """
    from datasets import Dataset

    if target.exists():
        raise RunFolderError(f"{target}: it is there already; name another folder, nothing was changed")
    reader = StoreReader(store)
    dataset = Dataset.from_generator(_records, features=_features(reader.manifest), gen_kwargs={"store": str(store)})
    description = {MANIFEST_KEY: reader.manifest.model_dump(mode="json")}
    dataset.info.description = json.dumps(description, ensure_ascii=False)
    dataset.save_to_disk(str(target))
    return len(dataset)


def import_dataset(source: Dataset, target: StorePath, *, rows_per_shard: int = 2048) -> int:
    """Make a store of a data set that `export_dataset` wrote.

    Args:
        source: with the columns of a store and the manifest in its description.
        target: folder of the new store, or of one that an earlier import left unfinished.
        rows_per_shard: rows of one shard.

    Returns:
        Rows of the store.

    Raises:
        DataError: the data set has no manifest, or a row's tokens do not give its hash.
        RunFolderError: the target holds something else.
        StoreError: the store cannot be written.
    """
    manifest = _manifest(source)
    with StoreWriter(target, manifest, rows_per_shard) as writer:
        for batch in _batches(source):
            writer.append([_rollout(record, manifest) for record in batch])
    return len(source)


def _batches(source: Dataset) -> Iterator[list[Mapping[str, Any]]]:
    iterator = iter(source.with_format("numpy"))
    while batch := list(itertools.islice(iterator, BATCH_ROWS)):
        yield batch


def _hexadecimal(number: int) -> str:
    # As text: datasets cannot write integers beyond 63 bits.
    return f"{number:016x}"


def _records(store: str) -> Iterator[dict[str, Any]]:
    for rollouts in StoreReader(store).scan():
        yield from map(_record, rollouts)


def _record(rollout: Rollout) -> dict[str, Any]:
    record: dict[str, Any] = {
        "row_id": rollout.row_id,
        "finish_reason": rollout.finish_reason,
        "token_hash": _hexadecimal(token_hash(rollout.prompt_ids, rollout.response_ids)),
        "prompt_ids": rollout.prompt_ids,
        "response_ids": rollout.response_ids,
        "response_logprobs": rollout.logprobs_T,
    }
    if rollout.teacher_prompt_hash is not None:
        record["teacher_prompt_hash"] = _hexadecimal(rollout.teacher_prompt_hash)
    if rollout.teacher is not None:
        record["teacher"] = rollout.teacher
    if rollout.origin is not None:
        record |= {
            "step": rollout.origin.step,
            "source": rollout.origin.source,
            "policy_version": rollout.origin.policy_version,
            "behaviour_logprobs": rollout.origin.behaviour_logprobs_T,
        }
    if rollout.sets is not None:
        record |= {
            "set_sizes": rollout.sets.sizes_S,
            "set_ids": rollout.sets.ids_M,
            "neg_log_mass": rollout.sets.neg_log_mass_S,
            "set_logprobs": rollout.sets.logprobs_M,
        }
    return record


def _features(manifest: StoreManifest) -> Any:
    from datasets import Features, List, Value

    columns: dict[str, Any] = {
        "row_id": Value("string"),
        "finish_reason": Value("string"),
        "token_hash": Value("string"),
        "prompt_ids": List(Value("int32")),
        "response_ids": List(Value("int32")),
        "response_logprobs": List(Value("float32")),
    }
    if manifest.has_teacher_prompts:
        columns["teacher_prompt_hash"] = Value("string")
    if manifest.teachers:
        columns["teacher"] = Value("string")
    if manifest.online:
        columns |= {"step": Value("int32"), "source": Value("string"), "policy_version": Value("int32")}
        columns["behaviour_logprobs"] = List(Value("float32"))
    if manifest.has_sets:
        columns |= {name: List(Value("int32")) for name in ("set_sizes", "set_ids")}
        # What float16 holds exactly; float32 spares readers that do not know the type.
        columns |= {name: List(Value("float32")) for name in ("neg_log_mass", "set_logprobs")}
    return Features(columns)


def _manifest(source: Dataset) -> StoreManifest:
    try:
        return StoreManifest.model_validate(json.loads(source.info.description)[MANIFEST_KEY])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise DataError(
            f"the data set's description holds no manifest of a store ({type(error).__name__}); expected a data set "
            "that openrlhf-bd export wrote"
        ) from error


def _rollout(record: Mapping[str, Any], manifest: StoreManifest) -> Rollout:
    prompt_ids, response_ids = _ids(record["prompt_ids"]), _ids(record["response_ids"])
    if _hexadecimal(token_hash(prompt_ids, response_ids)) != record["token_hash"]:
        raise DataError(
            f"row {str(record['row_id'])!r}: its token ids do not give its hash, so its sets may belong to other "
            "tokens; get the data set again"
        )
    return Rollout(
        row_id=str(record["row_id"]),
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        finish_reason=record["finish_reason"],
        logprobs_T=_logprobs(record["response_logprobs"]),
        sets=_sets(record, manifest) if manifest.has_sets else None,
        teacher_prompt_hash=int(record["teacher_prompt_hash"], 16) if manifest.has_teacher_prompts else None,
        teacher=str(record["teacher"]) if manifest.teachers else None,
        origin=_origin(record) if manifest.online else None,
    )


def _origin(record: Mapping[str, Any]) -> Origin:
    # A null among integers is NaN in this format.
    is_student = record["source"] == "student"
    return Origin(
        step=int(record["step"]),
        source="student" if is_student else "teacher",
        policy_version=int(record["policy_version"]) if is_student else None,
        behaviour_logprobs_T=_logprobs(record["behaviour_logprobs"]),
    )


def _logprobs(values: Any) -> NDArray[np.float32] | None:
    return None if values is None else np.asarray(values, np.float32)


def _sets(record: Mapping[str, Any], manifest: StoreManifest) -> RecordedSets:
    sizes_S = np.asarray(record["set_sizes"], np.int64)
    return RecordedSets(
        ids_M=_ids(record["set_ids"]),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes_S)]),
        neg_log_mass_S=np.asarray(record["neg_log_mass"], np.float32),
        logprobs_M=np.asarray(record["set_logprobs"], np.float32) if manifest.has_logprobs else None,
    )


def _ids(values: Any) -> NDArray[np.int32]:
    return np.asarray(values, dtype=np.int32)
