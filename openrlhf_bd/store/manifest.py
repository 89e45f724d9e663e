"""`manifest.json`: what a store holds, and how it was made.

    {"format_version": 2, "store_id": "...", "complete": false, "manifest": {...}, "sealed_shards": 7, "rewritten": 0,
     "quarantined": [], "checksum": "..."}

It is replaced in one step, and seldom; the sealed shards are listed by the `journal`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from openrlhf_bd.errors import RunFolderError, StoreError
from openrlhf_bd.store.fingerprints import fingerprint_json
from openrlhf_bd.store.folder import StoreFolder

MANIFEST_FILE = "manifest.json"
# The options of the job that made the rows, as YAML: what a repair repeats.
JOB_FILE = "job.yaml"
FORMAT_VERSION = 2
# What a message about a damaged file ends with.
REMEDY = (
    "restore the file from a copy, or have its rows made again: openrlhf-bd inspect PATH --repair, where PATH is the "
    "store's folder"
)
# Its manifest lists the shards, and there is no journal.
LISTING_VERSION = 1

# Recorded for people; two stores that differ in these alone hold the same kind of rows.
NOT_IDENTITY = ("versions", "created")
# Fingerprints that say more than their value: the teacher saw other prompts; one model of several.
TEACHER_PROMPTS = "teacher_prompts"
TEACHER_PREFIX = "teacher:"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoreManifest(_Frozen):
    """What the rows of a store are. All but `versions` and `created` is its identity.

    Attributes:
        kind: "teacher" (responses of the teacher) or "gold" (the data set's own; with sets, a teacher scored them).
        fingerprints: name -> fingerprint of what the rows depend on: "tokenizer", "prompts", "teacher", ...
            With "teacher_prompts" the teacher saw other prompts than the rows have; "teacher:<name>" is one of several
            teachers, and each row names its own.
        top_p: mass p of the candidate sets (Def. 1), or None if the rows have none. At 1 each set is the whole
            vocabulary, and no ids are stored.
        always_include: token ids that belong to every candidate set.
        has_logprobs: the candidates' log-probabilities are recorded too.
        max_candidates: K, where the teacher told the K likeliest tokens of a state alone: a set has no others, so that
            its mass may be less than top_p, and lacks an always-included id that is neither among them nor taken.
            None: the sets are exact.
        sampling: parameters by which the responses were sampled.
        num_prompts: prompts that the finished store covers.
        n_samples_per_prompt: responses to each; 1 in a store of an online run, which comes back to its prompts.
        online: rows of an online run: each has an origin (`records.Origin`).
        total_rows: rows of the finished store of an online run, one for each place of each step's batch; None in
            others, where it is prompts times samples.
        versions: package -> version that made the first row.
        created: UTC time, ISO 8601.
    """

    kind: Literal["teacher", "gold"]
    fingerprints: dict[str, str] = Field(default_factory=dict)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    always_include: tuple[int, ...] = ()
    has_logprobs: bool = False
    max_candidates: int | None = Field(None, gt=0)
    sampling: dict[str, JsonValue] = Field(default_factory=dict)
    num_prompts: int = Field(gt=0)
    n_samples_per_prompt: int = Field(1, gt=0)
    online: bool = False
    total_rows: int | None = Field(None, gt=0)
    versions: dict[str, str] = Field(default_factory=dict)
    created: str = Field(default_factory=_now)

    @model_validator(mode="after")
    def _options_fit_together(self) -> Self:
        if self.kind == "gold" and self.has_whole_sets:
            raise ValueError("gold rows have sets that list ids, or none; found top_p 1, at which sets list none")
        if not self.has_sets and (self.has_logprobs or self.always_include):
            raise ValueError("has_logprobs and always_include describe candidate sets; expected top_p beside them")
        if self.has_whole_sets and (self.has_logprobs or self.always_include):
            raise ValueError("sets of top_p 1 list no ids; expected neither has_logprobs nor always_include beside it")
        if self.max_candidates is not None and (not self.has_sets or self.has_whole_sets):
            raise ValueError("max_candidates describes sets that list ids; expected a top_p below 1 beside it")
        if self.online and self.kind == "gold":
            raise ValueError("gold rows are there before any step; expected kind teacher beside online")
        if self.online != (self.total_rows is not None):
            raise ValueError(
                f"total_rows is {self.total_rows} and online {self.online}; expected both or neither: offline stores "
                "have as many rows as prompts times samples"
            )
        return self

    @property
    def has_sets(self) -> bool:
        return self.top_p is not None

    @property
    def has_response_logprobs(self) -> bool:
        """Whether a teacher told the log-probabilities of the responses' tokens."""
        return self.kind == "teacher" or self.has_sets

    @property
    def has_whole_sets(self) -> bool:
        """Whether each set is the whole vocabulary (p = 1)."""
        return self.top_p == 1

    @property
    def has_teacher_prompts(self) -> bool:
        """Whether the teacher saw other prompts than the student sees."""
        return TEACHER_PROMPTS in self.fingerprints

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers where there are several, in alphabetical order."""
        keys = (key for key in self.fingerprints if key.startswith(TEACHER_PREFIX))
        return tuple(sorted(key.removeprefix(TEACHER_PREFIX) for key in keys))

    @property
    def num_rows(self) -> int:
        """Rows of the finished store."""
        return self.total_rows or self.num_prompts * self.n_samples_per_prompt

    @property
    def num_rows_in_words(self) -> str:
        """Where the number of rows comes from."""
        if self.online:
            return f"steps of an online run over {self.num_prompts} prompts"
        return f"{self.num_prompts} prompts with {self.n_samples_per_prompt} responses each"

    def identity(self) -> dict[str, Any]:
        """What must be equal for rows to go into the same store: dotted key -> JSON value."""
        return flatten(self.model_dump(mode="json", exclude=set(NOT_IDENTITY)))

    def differences(self, expected: StoreManifest) -> list[str]:
        """Each key of the identity in which this manifest differs: "key: found ..., expected ..."."""
        here, there = self.identity(), expected.identity()
        keys = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        return [f"{key}: found {here.get(key)!r}, expected {there.get(key)!r}" for key in keys]

    def require_equal(self, expected: StoreManifest, folder: StoreFolder) -> None:
        """Refuse a store that is not the expected one.

        Raises:
            RunFolderError: some key of the identity differs; the message lists each.
        """
        differing = self.differences(expected)
        if differing:
            raise RunFolderError(
                f"{folder}: the store there was made otherwise than this job needs:\n  "
                + "\n  ".join(differing)
                + "\nName another path for this job, or change its options to those found; nothing was changed"
            )


class ShardEntry(_Frozen):
    """One sealed shard. Counts are over its rows; `num_states` are states with a candidate set.

    `footer_sha256` is that of Parquet's footer (where the columns lie, and how they are encoded): it is checked
    whenever the shard is opened, since pages carry checksums and the footer carries none.
    """

    file: str
    num_rows: int
    num_prompt_tokens: int
    num_response_tokens: int
    num_states: int
    num_candidates: int
    size_bytes: int
    sha256: str
    footer_sha256: str


class QuarantinedRow(_Frozen):
    """A row that was given up, and why: it ended the engines that worked on it."""

    row_id: str
    reason: str


class StoreState(_Frozen):
    """The content of `manifest.json`.

    Attributes:
        store_id: drawn when the store was created and written into each shard, so that a foreign shard is noticed.
        complete: all rows are there but the quarantined ones; nothing will be added.
        manifest: what the rows are.
        sealed_shards: shards that the journal listed when this was written: all of them in a complete store, the
            fewest that there must be in an unfinished one.
        rewritten: times that the journal was written anew, by a repair, and not appended to.
        quarantined: rows that were given up.
        listed: the shards, in stores of format version 1; None in others.
    """

    format_version: int = FORMAT_VERSION
    store_id: str
    complete: bool = False
    manifest: StoreManifest
    sealed_shards: int = 0
    rewritten: int = 0
    quarantined: tuple[QuarantinedRow, ...] = ()
    listed: tuple[ShardEntry, ...] | None = Field(None, exclude=True)

    def save(self, folder: StoreFolder) -> None:
        """Replace the folder's manifest in one step.

        Raises:
            OSError: the disk is full or failing; the old manifest is still there.
        """
        content = self.model_dump(mode="json")
        text = json.dumps(content | {"checksum": fingerprint_json(content)}, indent=1, ensure_ascii=False)
        folder.replace(MANIFEST_FILE, f"{text}\n".encode())

    @classmethod
    def find(cls, folder: StoreFolder) -> Self | None:
        """As `load`, or None where no store is."""
        return None if folder.size_bytes(MANIFEST_FILE) is None else cls.load(folder)

    @classmethod
    def load(cls, folder: StoreFolder) -> Self:
        """Read and check the folder's manifest.

        Raises:
            StoreError: it is missing, damaged, or of another format version.
        """
        path = f"{folder}/{MANIFEST_FILE}"
        try:
            content = json.loads(folder.read(MANIFEST_FILE))
        except FileNotFoundError:
            raise StoreError(
                f"{path}: not found; expected a store (made by `openrlhf-bd generate`). Check the path"
            ) from None
        except ValueError as error:
            raise _damaged(path, f"not JSON ({error})") from None
        if not isinstance(content, dict):
            raise _damaged(path, "not a JSON object")
        version = content.get("format_version")
        if version not in (LISTING_VERSION, FORMAT_VERSION):
            raise StoreError(
                f"{path}: format version {version!r}, expected {FORMAT_VERSION}; "
                "read it with the version of openrlhf_bd that wrote it, or generate the data again at another path"
            )
        found, expected = content.pop("checksum", None), fingerprint_json(content)
        if found != expected:
            raise _damaged(path, f"its checksum is {found!r}, its content gives {expected!r}")
        if version == LISTING_VERSION:
            content["listed"] = content.pop("shards", [])
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise _damaged(path, str(error)) from None


def _damaged(path: str, finding: str) -> StoreError:
    return StoreError(
        f"{path}: damaged or edited by hand: {finding}. "
        "Restore it from a copy, or generate the data again at another path"
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones: {"a": {"b": 1}} gives {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
