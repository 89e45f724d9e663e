"""The rows that the student learns from: the teacher's responses, or the data set's own, in one store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.data.prompts import PromptTable, gold_rollouts, with_references
from openrlhf_bd.data.routes import DEFAULT_TEACHER, is_routed, teacher_models
from openrlhf_bd.driver.engines import teacher_engines
from openrlhf_bd.driver.manifests import gold_manifest, wanted_manifest
from openrlhf_bd.driver.progress import stage_progress
from openrlhf_bd.driver.remote_teacher import is_remote
from openrlhf_bd.driver.run_folder import CONFIG_FILE
from openrlhf_bd.driver.timeline import driver_span
from openrlhf_bd.driver.verify import verify_rows
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.errors import RunFolderError
from openrlhf_bd.records import Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter
from openrlhf_bd.store.files import second_writer
from openrlhf_bd.store.folder import StorePath, open_folder
from openrlhf_bd.store.manifest import StoreState
from openrlhf_bd.teacher.generate import generate_teacher_data
from openrlhf_bd.teacher.requests import ScoringRequest
from openrlhf_bd.teacher.work import Sampling, Scoring, Work

# What an algorithm reads may be cut out of sets that were recorded for another: these keys need not be equal.
_SET_KEYS = ("top_p", "always_include", "has_logprobs")
# Rows of an online run serve an offline one whatever made them, if these are equal.
_ONLINE_KEYS = ("fingerprints.tokenizer", "fingerprints.teacher", "kind")
_GOLD_BATCH = 1024
VALIDATION_FOLDER = "validation_data"


@dataclass(frozen=True, slots=True)
class Rows:
    """A complete store, and whether an earlier run had made it."""

    path: StorePath
    reused: bool


def rows_path(config: Config, needs: Needs) -> StorePath:
    """Where the rows of a job are kept: a folder, or the URL of one."""
    output_dir = Path(config.ckpt.output_dir)
    if not needs.rows_by_teacher:
        return output_dir / "gold_data"
    if config.algo.distill.mode == "online":
        return online_path(config)
    return open_folder(config.teacher.store_path).url if config.teacher.store_path else output_dir / "teacher_data"


def check_rows(path: StorePath, manifest: StoreManifest, *, need_sets: bool) -> None:
    """Refuse a store that is there and cannot be used or continued, before anything starts. Nothing is changed.

    Args:
        path: of the store.
        manifest: what its rows must be.
        need_sets: the algorithm reads candidate sets.

    Raises:
        RunFolderError: the store holds other rows (each difference is named), or another process is writing to it.
        StoreError: some of it is damaged; the message names the files, their rows, and the command that mends them.
    """
    folder = open_folder(path)
    state = StoreState.find(folder)
    if state is None:
        return
    if (holder := folder.lock_holder()) is not None:
        raise second_writer(folder, holder)
    if not _is_complete(path, manifest, need_sets=need_sets):
        state.manifest.require_equal(manifest, folder)
    verify_rows(path)
    StoreReader(path, require_complete=False)


def online_path(config: Config) -> Path:
    """Where the rows of an online run are kept."""
    return Path(config.ckpt.output_dir) / "rollouts"


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
    manifest = wanted_manifest(config, needs, prompts, tokenizer, stop_ids=stop_ids)
    if _is_complete(path, manifest, need_sets=needs.candidate_sets):
        return Rows(path, reused=True)
    if needs.rows_by_teacher:
        _generate(config, path, manifest, prompts, tokenizer)
    else:
        _write_gold(config, path, manifest, prompts, tokenizer)
    return Rows(path, reused=False)


def is_complete_store(path: StorePath) -> bool:
    """Whether there is a finished store, whatever its rows.

    Raises:
        StoreError: it is damaged.
    """
    state = StoreState.find(open_folder(path))
    return state is not None and state.complete


def _is_complete(path: StorePath, wanted: StoreManifest, *, need_sets: bool) -> bool:
    """Whether a finished store serves: the same rows, with at least the candidates that are wanted.

    Raises:
        RunFolderError: the store holds other rows.
    """
    state = StoreState.find(open_folder(path))
    if state is None or not state.complete:
        return False
    found = state.manifest
    differing = [
        difference
        for difference in found.differences(wanted)
        if (difference.startswith(_ONLINE_KEYS) if found.online else not difference.startswith(_SET_KEYS))
    ]
    if need_sets and not _sets_serve(found, wanted):
        differing.append(f"candidate sets: found {_set_words(found)}; expected {_set_words(wanted)} or more")
    if differing:
        place = "--teacher.store_path" if wanted.has_response_logprobs else "--ckpt.output_dir"
        raise RunFolderError(
            f"{path}: the finished store there was made otherwise than this job needs:\n  "
            + "\n  ".join(differing)
            + f"\nName another {place}, or change options and data to those found; nothing was changed"
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


def _write_gold(
    config: Config, path: StorePath, manifest: StoreManifest, prompts: PromptTable, tokenizer: PreTrainedTokenizerBase
) -> None:
    rollouts = gold_rollouts(prompts, tokenizer, str(config.data.label_key), config.data.max_len)
    with (
        StoreWriter(path, manifest, config.teacher.rows_per_shard) as writer,
        stage_progress("write gold rows", manifest.num_rows, "rows") as progress,
    ):
        for batch in _batches(rollouts, _GOLD_BATCH):
            writer.append(batch)
            progress.advance(len(batch))


def write_validation_rows(config: Config, prompts: PromptTable, tokenizer: PreTrainedTokenizerBase) -> StorePath | None:
    """The validation set's own responses as a store of the run, of which the ranks compute the validation loss.

    Args:
        config: the job; `data.label_key` is given.
        prompts: of the validation set; those without a reference are left out.
        tokenizer: of the student.

    Returns:
        The store; None where no prompt has a reference.

    Raises:
        StoreError: it cannot be written, or an earlier run's is damaged.
    """
    prompts = with_references(prompts, str(config.data.label_key))
    if not prompts.prompts:
        return None
    path = Path(config.ckpt.output_dir) / VALIDATION_FOLDER
    manifest = gold_manifest(config, prompts, tokenizer)
    if not _is_complete(path, manifest, need_sets=False):
        _write_gold(config, path, manifest, prompts, tokenizer)
    return path


def _batches(rollouts: Iterable[Rollout], size: int) -> Iterator[list[Rollout]]:
    iterator = iter(rollouts)
    while batch := list(islice(iterator, size)):
        yield batch


def _generate(
    config: Config, path: StorePath, manifest: StoreManifest, prompts: PromptTable, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Every missing row, one teacher after another: each has all the engines while it works."""
    record = RecordOptions(manifest.top_p, manifest.always_include, logprobs=manifest.has_logprobs)
    with StoreWriter(path, manifest, config.teacher.rows_per_shard) as writer:
        # With it a repair can make rows again, from whatever run began the store.
        writer.keep_job((Path(config.ckpt.output_dir) / CONFIG_FILE).read_text(encoding="utf-8"))
        models = {DEFAULT_TEACHER: str(config.teacher.api_base)} if is_remote(config) else teacher_models(config)
        for name, model in models.items():
            own = replace(prompts, prompts=[each for each in prompts.prompts if each.teacher in (name, None)])
            work = _scoring(config, own, tokenizer) if manifest.kind == "gold" else Sampling(own.prompts, config)
            title = f"teacher {name} {work.verb}" if is_routed(config) else f"teacher {work.verb}"
            _generate_by(model, work, writer, config=config, record=record, title=title)


def _scoring(config: Config, prompts: PromptTable, tokenizer: PreTrainedTokenizerBase) -> Scoring:
    """The data set's own responses to these prompts, for their teacher to score."""
    rollouts = gold_rollouts(
        prompts,
        tokenizer,
        str(config.data.label_key),
        config.data.max_len,
        teacher_max_len=teacher_length(config),
    )
    pairs = zip(rollouts, prompts.prompts, strict=True)
    return Scoring([ScoringRequest(rollout, prompt.teacher_ids) for rollout, prompt in pairs])


def _generate_by(
    model: str, work: Work, writer: StoreWriter, *, config: Config, record: RecordOptions, title: str
) -> None:
    """The rows of one teacher; nothing is started where all are there."""
    num_rows = sum(1 for _ in work.requests())
    num_pending = sum(1 for _ in work.requests(completed=writer.settled_rows()))
    if num_pending == 0:
        return
    with (
        teacher_engines(config, model=model, record=record, num_engines=config.teacher.num_engines) as engines,
        stage_progress(title, num_rows, "rows") as progress,
    ):
        progress.start_at(num_rows - num_pending)
        with driver_span("generate"):
            generate_teacher_data(
                work,
                engines.handles,
                writer,
                config=config,
                replace_engine=engines.replace,
                on_progress=progress.advance,
            )
