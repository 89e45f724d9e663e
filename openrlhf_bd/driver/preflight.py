"""Every check that can be made before the first actor starts. Nothing is written, and no Ray session is needed.

Cheap checks come first: options among themselves, then model files, then tokenizers, then every record of local data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.config import Config
from openrlhf_bd.data.formats import teacher_format
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.data.pretrain import check_pretrain
from openrlhf_bd.data.prompts import (
    PromptTable,
    gold_rollouts,
    load_evaluation_prompts,
    load_prompts,
    with_references,
)
from openrlhf_bd.data.routes import DEFAULT_TEACHER, teacher_models, teacher_option
from openrlhf_bd.data.teacher_view import teacher_view
from openrlhf_bd.driver.disk import disk_uses, disk_warnings, num_prompt_tokens, num_response_tokens
from openrlhf_bd.driver.engine_limits import check_head_sizes, known_device
from openrlhf_bd.driver.evaluation import load_test_sets
from openrlhf_bd.driver.gpu_memory import gpu_uses
from openrlhf_bd.driver.model_files import STUDENT_OPTION, ModelFacts, inspect_model
from openrlhf_bd.driver.models import load_tokenizer
from openrlhf_bd.driver.objective import uses_pretrain
from openrlhf_bd.driver.option_checks import check_options
from openrlhf_bd.driver.plan import Plan, StagePlan
from openrlhf_bd.driver.plan_warnings import job_warnings, vocabulary_warnings
from openrlhf_bd.driver.rank_memory import rank_memory_notes
from openrlhf_bd.driver.remote_teacher import check_server, is_remote
from openrlhf_bd.driver.resources import STAGES, Stage, holds_teacher, makes_rows, stage_actors, takes_part
from openrlhf_bd.driver.schedule import shuffled_schedule
from openrlhf_bd.driver.selection import LOSS, selection_metric, validates_by_loss
from openrlhf_bd.driver.teacher_data import is_complete_store, rows_path
from openrlhf_bd.driver.teachers import asked_teachers, check_same_tokenizer, check_stop_tokens, teacher_lines
from openrlhf_bd.engines.arguments import stop_token_ids
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.rollout.plan import RowPlan

# Of the pre-training text only the first records are read here; all of it is read when its blocks are written.
_PRETRAIN_RECORDS = 1000


@dataclass(frozen=True, slots=True)
class _Data:
    tables: dict[str, PromptTable]
    lines: list[str]
    tokenizer: PreTrainedTokenizerBase


def preflight(config: Config, *, stages: Sequence[Stage] = STAGES) -> Plan:
    """Check a job and say what it is going to do.

    Args:
        config: the job.
        stages: which stages it runs. Of these, "generate" is skipped where the algorithm learns from the data set's
            own responses, and "evaluate" where no test set is named.

    Raises:
        ConfigError: options contradict each other or the models.
        DataError: a model, tokenizer or data set is missing or not what the job needs.
    """
    needs = resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill)
    asked, stages = stages, [stage for stage in stages if takes_part(stage, config, needs)]
    if not stages:
        if "evaluate" in asked:
            raise ConfigError(
                "nothing to evaluate: --eval.test_datasets is not given; expected name=path entries separated by commas"
            )
        if config.algo.distill.mode == "online":
            raise ConfigError(
                "nothing to do: with --algo.distill.mode online the rows are made while the student trains "
                "(openrlhf-bd train); use --algo.distill.mode offline to make them before"
            )
        raise ConfigError(
            f"nothing to do: --algo.distill.name {config.algo.distill.name} learns from the data set's own responses "
            "and needs no row of the teacher's"
        )
    check_options(config, stages, needs)
    models = _check_models(config, stages)
    device = known_device()
    check_head_sizes(config, models, device=device, stages=stages)
    if makes_rows(config, stages):
        check_stop_tokens(config)
    data = _check_data(config, stages, needs)
    lines = [*data.lines, *_check_server(config, stages, needs, data.tokenizer)]
    _check_vocabularies(models, data.tokenizer)
    _check_stops(config, models)
    student = models.get(STUDENT_OPTION)
    plans = tuple(_plan_stage(stage, config, needs, data.tables) for stage in stages)
    disk = disk_uses(config, plans, data.tables, student=student)
    warnings = [*job_warnings(config, stages, needs, data.tables), *vocabulary_warnings(models)]
    teacher = models.get("--teacher.model_name_or_path")
    notes = rank_memory_notes(config, needs, student=student, teacher=teacher) if "train" in stages else []
    warnings += disk_warnings(disk)
    return Plan(
        stages=plans,
        data_sets=tuple(lines),
        tables=data.tables,
        models=models,
        notes=tuple(notes),
        warnings=tuple(warnings),
        disk=disk,
        gpu=None if device == "cpu" else gpu_uses(config, needs, models, stages=stages),
    )


def _check_models(config: Config, stages: Sequence[Stage]) -> dict[str, ModelFacts]:
    """Facts of the models that the stages load, by the option that names each."""
    wanted: dict[str, tuple[str | None, int, str]] = {}
    for teacher, model in asked_teachers(config, stages).items():
        wanted[teacher_option(teacher)] = (model, config.teacher.tensor_parallel_size, "teacher")
    if "train" in stages or (stages == ["evaluate"] and config.actor.model_name_or_path is not None):
        wanted[STUDENT_OPTION] = (config.actor.model_name_or_path, config.vllm.tensor_parallel_size, "vllm")
    models = {}
    for option, (name, parallel, section) in wanted.items():
        if name is None:
            raise ConfigError(f"{option} is not given; name a model folder, or a model on the hub")
        facts = inspect_model(name, option=option, trust_remote_code=config.trust_remote_code)
        length, limit = _longest(config, section)
        if facts.max_positions is not None and length > facts.max_positions:
            raise ConfigError(
                f"{limit} {length} is more than the {facts.max_positions} positions of {name} ({option}); lower it"
            )
        if facts.num_heads is not None and facts.num_heads % parallel:
            raise ConfigError(
                f"--{section}.tensor_parallel_size {parallel} does not divide the {facts.num_heads} attention heads of "
                f"{name} ({option}); choose a divisor"
            )
        models[option] = facts
    if "train" in stages:
        from openrlhf_bd.student.live_teacher import check_live_teacher
        from openrlhf_bd.student.loading import check_family
        from openrlhf_bd.student.lora import check_lora

        check_family(models[STUDENT_OPTION].family, config)
        check_lora(config)
        if holds_teacher(config, stages):
            check_live_teacher(models[teacher_option(DEFAULT_TEACHER)].family, config)
    return models


def _longest(config: Config, section: str) -> tuple[int, str]:
    """Longest sequence of a model, tokens, and the option that says so."""
    if section == "teacher" and config.teacher.max_len is not None:
        return teacher_length(config), "--teacher.max_len"
    return config.data.max_len, "--data.max_len"


def _check_data(config: Config, stages: Sequence[Stage], needs: Needs) -> _Data:
    student = config.actor.model_name_or_path
    teachers = {name: str(model) for name, model in asked_teachers(config, stages).items()}
    some_teacher = next(iter(teacher_models(config).values()), None)
    own = student if "train" in stages or student is not None else some_teacher
    if own is None:
        raise ConfigError("--actor.model_name_or_path is not given; name a model folder, or a model on the hub")
    tokenizer = load_tokenizer(own, config)
    teacher_tokenizers = {name: load_tokenizer(model, config) for name, model in teachers.items()}
    if is_remote(config):
        teacher_tokenizers[DEFAULT_TEACHER] = tokenizer
    for name, model in teachers.items():
        check_same_tokenizer(teacher_tokenizers[name], tokenizer, teacher=model, student=own)
    if "train" in stages and needs.live_teacher:
        _check_same_view(config, tokenizer, teacher_tokenizers[DEFAULT_TEACHER])
    tables = {}
    if "generate" in stages or "train" in stages:
        if config.data.prompt_dataset is None:
            raise ConfigError("--data.prompt_dataset is not given; name a file, folder or hub data set of prompts")
        tables["train"] = load_prompts(
            config,
            tokenizer,
            spec=config.data.prompt_dataset,
            split=config.data.prompt_split,
            purpose="train",
            need_reference=needs.rollouts == "gold",
            teacher=teacher_view(config, tokenizer, teacher_tokenizers) if makes_rows(config, stages) else None,
        )
    if "train" in stages and config.eval.dataset is not None:
        tables["validation"] = load_evaluation_prompts(
            config, tokenizer, spec=config.eval.dataset, purpose="validation"
        )
    if "evaluate" in stages:
        tables |= {f"test:{name}": table for name, table in load_test_sets(config, tokenizer).items()}
    lines = [f"{name}: {table.summary()}" for name, table in tables.items()]
    if "train" in stages and validates_by_loss(config):
        lines += _validation_loss_lines(config, tables["validation"], tokenizer)
    if makes_rows(config, stages):
        lines += teacher_lines(config, tables["train"])
    if "train" in stages and uses_pretrain(config):
        lines.append(f"pretrain: {check_pretrain(config, num_records=_PRETRAIN_RECORDS)} records")
    return _Data(tables, lines, tokenizer)


def _check_same_view(
    config: Config, tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a teacher that sees other prompts, where it reads the student's in the student's ranks."""
    if teacher_format(config, tokenizer, teacher_tokenizer) is not None:
        raise ConfigError(
            f"--algo.distill.name {config.algo.distill.name} with a teacher in each rank: it reads the student's "
            "prompts there, and options of --teacher.* give it others; leave them out, or use "
            "--algo.distill.kd_support sets"
        )


def _validation_loss_lines(config: Config, table: PromptTable, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the validation loss is over, where that is not all of the references of all prompts.

    Raises:
        ConfigError: references are to select the student, and there is none.
        DataError: the tokenizer has no token that ends a response.
    """
    key, num_prompts = str(config.data.label_key), len(table.prompts)
    table = with_references(table, key)
    if not table.prompts and (metric := selection_metric(config)) in ("rouge_l", LOSS):
        raise ConfigError(
            f"--ckpt.best_metric_key is {metric!r}, and no record of {config.eval.dataset} has a reference in {key!r} "
            "(--data.label_key); name the key of the references, or select by accuracy (--eval.checker)"
        )
    rows = list(gold_rollouts(table, tokenizer, key, config.data.max_len))
    num_cut = sum(row.finish_reason == "length" for row in rows)
    lines = []
    if len(rows) < num_prompts:
        lines.append(f"validation loss: over the {len(rows)} of {num_prompts} prompts with a reference")
    if num_cut:
        lines.append(
            f"validation loss: {num_cut} of {len(rows)} references are cut, as rows of training are, where prompt and "
            f"reference have more than {config.data.max_len} tokens (--data.max_len)"
        )
    return lines


def _check_server(
    config: Config, stages: Sequence[Stage], needs: Needs, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Ask the teacher's server, where there is one and a stage needs it: not for rows that are all there."""
    if not is_remote(config):
        return []
    is_online = "train" in stages and config.algo.distill.mode != "offline"
    scores = is_online or ("evaluate" in stages and config.eval.teacher_nll) or needs.rollouts == "gold"
    asked = is_online or ("evaluate" in stages and config.eval.teacher_nll)
    if not asked and ("generate" not in stages or is_complete_store(rows_path(config, needs))):
        return []
    return [check_server(config, tokenizer, scores=scores)]


def _check_vocabularies(models: Mapping[str, ModelFacts], tokenizer: PreTrainedTokenizerBase) -> None:
    for option, facts in models.items():
        if facts.vocab_size < len(tokenizer):
            raise DataError(
                f"{facts.name}: has {facts.vocab_size} embeddings for the {len(tokenizer)} tokens of its tokenizer; "
                f"expected at least as many. Take the tokenizer that belongs to the model ({option})"
            )


def _check_stops(config: Config, models: Mapping[str, ModelFacts]) -> None:
    for option, facts in models.items():
        beyond = [
            token_id
            for token_id in stop_token_ids(facts.name, trust_remote_code=config.trust_remote_code)
            if token_id >= facts.vocab_size
        ]
        if beyond:
            raise DataError(
                f"{facts.name}: its responses end at the tokens {beyond}, and it has {facts.vocab_size} embeddings; "
                f"expected ids below that. Mend the eos_token_id of its generation_config.json ({option})"
            )


def _plan_stage(stage: Stage, config: Config, needs: Needs, tables: Mapping[str, PromptTable]) -> StagePlan:
    actors, folder = stage_actors(config, stage), config.ckpt.output_dir
    if stage == "evaluate":
        tests = [table for name, table in tables.items() if name.startswith("test:")]
        seeds = len(config.eval.seeds) * len(config.eval.test_top_p)
        tokens = seeds * sum(_num_tokens(config, table, config.eval.max_new_tokens) for table in tests)
        rows = seeds * sum(len(table.prompts) for table in tests)
        return StagePlan(stage, rows, tokens, None, actors, f"{folder}/evaluation.json")
    table = tables["train"]
    samples = config.rollout.n_samples_per_prompt if needs.rollouts == "teacher" else 1
    rows, tokens = samples * len(table.prompts), samples * _num_tokens(config, table, config.rollout.max_new_tokens)
    if stage == "generate":
        return StagePlan(stage, rows, tokens, None, actors, config.teacher.store_path or f"{folder}/teacher_data")
    schedule = shuffled_schedule(config, rows)
    if config.algo.distill.mode != "offline":
        offline = 0
        if config.algo.distill.mode == "offline_then_online":
            offline = config.algo.distill.offline_steps or schedule.per_epoch
        rollout = needs.rollout_of(config.algo.distill)
        plan = RowPlan(table.prompts, config, rollout=rollout, offline_steps=offline)
        return StagePlan(stage, plan.num_rows, tokens * config.train.max_epochs, plan.last_step, actors, folder)
    return StagePlan(stage, rows, tokens * config.train.max_epochs, schedule.total, actors, folder)


def _num_tokens(config: Config, table: PromptTable, max_new_tokens: int | None) -> int:
    """Prompt and response tokens, if every response is as long as it may be."""
    return num_prompt_tokens(table) + num_response_tokens(config, table, max_new_tokens)
