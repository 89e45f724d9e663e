"""Every check that can be made before the first actor starts. Nothing is written, and no Ray session is needed.

Cheap checks come first: options among themselves, then model files, then tokenizers, then every record of local data.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, SchedulerType

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.config import Config, DistillConfig, OnlineOptions, TeacherConfig
from openrlhf_bd.data.formats import teacher_format
from openrlhf_bd.data.limits import prompt_limit, teacher_length
from openrlhf_bd.data.pretrain import check_pretrain
from openrlhf_bd.data.prompts import (
    PromptTable,
    gold_rollouts,
    load_evaluation_prompts,
    load_prompts,
)
from openrlhf_bd.data.routes import DEFAULT_TEACHER, teacher_models, teacher_option
from openrlhf_bd.data.teacher_view import teacher_view
from openrlhf_bd.data.test_sets import parse_test_datasets
from openrlhf_bd.driver.disk import disk_uses, disk_warnings, num_prompt_tokens, num_response_tokens
from openrlhf_bd.driver.engine_limits import check_head_sizes, known_device
from openrlhf_bd.driver.evaluation import load_test_sets
from openrlhf_bd.driver.gpu_memory import gpu_uses
from openrlhf_bd.driver.model_files import STUDENT_OPTION, ModelFacts, inspect_model
from openrlhf_bd.driver.models import load_tokenizer
from openrlhf_bd.driver.objective import (
    check_colocation,
    check_kd_ratio,
    check_live_teacher_of,
    check_online,
    trained_temperature,
    unheld_logits,
    uses_pretrain,
)
from openrlhf_bd.driver.plan import Plan, StagePlan
from openrlhf_bd.driver.rank_memory import rank_memory_notes
from openrlhf_bd.driver.remote_teacher import check_remote_options, check_server, is_remote
from openrlhf_bd.driver.resources import (
    STAGES,
    Stage,
    holds_teacher,
    makes_rows,
    stage_actors,
    takes_part,
)
from openrlhf_bd.driver.schedule import shuffled_schedule
from openrlhf_bd.driver.selection import LOSS, selection_metric, validates_by_loss
from openrlhf_bd.driver.teacher_data import is_complete_store, rows_path
from openrlhf_bd.driver.teachers import (
    asked_teachers,
    check_same_tokenizer,
    check_stop_tokens,
    teacher_lines,
    teacher_warnings,
)
from openrlhf_bd.engines.arguments import stop_token_ids
from openrlhf_bd.errors import ConfigError, DataError, StoreError
from openrlhf_bd.evaluation.checker import load_checker
from openrlhf_bd.paths import existing_parent
from openrlhf_bd.rollout.plan import RowPlan
from openrlhf_bd.store.folder import open_folder

# Of the pre-training text only the first records are read here; all of it is read when its blocks are written.
_PRETRAIN_RECORDS = 1000
# Schedules that ask for more than the number of a step, which does not reach them: a metric, or steps of the decay.
_OTHER_SCHEDULES = ("greedy", "reduce_lr_on_plateau", "warmup_stable_decay")
# What concerns the student's own rows alone.
_STUDENT_ROW_OPTIONS = ("teacher_mix", "max_staleness", "stale_rows", "in_flight", "sync_steps")
_ATTENTIONS = (
    *("auto", "sdpa", "eager", "flex_attention"),
    *("flash_attention_2", "flash_attention_3", "flash_attention_4"),
)


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
    stages = [stage for stage in stages if takes_part(stage, config, needs)]
    if not stages:
        if config.algo.distill.mode == "online":
            raise ConfigError(
                "nothing to do: with --algo.distill.mode online the rows are made while the student trains "
                "(openrlhf-bd train); use --algo.distill.mode offline to make them before"
            )
        raise ConfigError(
            f"nothing to do: either --eval.test_datasets names no test set, or --algo.distill.name "
            f"{config.algo.distill.name} learns from the data set's own responses and needs no row of the teacher's"
        )
    _check_options(config, stages, needs)
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
    warnings = [*_warnings(config, stages, needs, data.tables), *_vocabulary_warnings(models)]
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


def _check_store_path(path: str) -> None:
    """The driver and each rank must be able to open the teacher's data."""
    try:
        open_folder(path)
    except StoreError as error:
        raise ConfigError(f"--teacher.store_path {error}") from None
    if path.startswith("memory://"):
        raise ConfigError(
            f"--teacher.store_path {path}: one process sees it, and a run has several; name another place"
        )


def _check_options(config: Config, stages: Sequence[Stage], needs: Needs) -> None:
    prompt_limit(config)
    teacher_length(config)
    check_remote_options(config)
    if config.eval.checker is not None:
        load_checker(config.eval.checker)
    if config.eval.test_datasets is not None:
        parse_test_datasets(config.eval.test_datasets)
    _check_output_folder(Path(config.ckpt.output_dir))
    if config.teacher.store_path is not None:
        _check_store_path(config.teacher.store_path)
    if "train" in stages:
        _check_recorded(config, needs)
        _check_training_options(config)
        check_live_teacher_of(config, needs)
        check_online(config, needs)
        check_colocation(config, needs)


def _check_recorded(config: Config, needs: Needs) -> None:
    if needs.candidate_logprobs and not config.teacher.record_logprobs:
        raise ConfigError(
            f"--teacher.record_logprobs false: --algo.distill.name {config.algo.distill.name} with these options needs "
            "the candidates' log-probabilities; use --teacher.record_logprobs true"
            + (", or --algo.distill.linear_term sampled" if config.algo.distill.name == "bd" else "")
        )


def _check_training_options(config: Config) -> None:
    from openrlhf_bd.student.strategy import make_strategy

    make_strategy(config)
    check_kd_ratio(config)
    num_ranks = config.actor.num_nodes * config.actor.num_gpus_per_node
    if config.train.batch_size < num_ranks:
        raise ConfigError(
            f"--train.batch_size {config.train.batch_size} is less than one row for each of the {num_ranks} student "
            f"ranks (--actor.num_nodes {config.actor.num_nodes} x --actor.num_gpus_per_node "
            f"{config.actor.num_gpus_per_node}); raise it, or take fewer ranks"
        )
    schedules = [schedule.value for schedule in SchedulerType if schedule.value not in _OTHER_SCHEDULES]
    if config.actor.lr_scheduler not in schedules:
        raise ConfigError(
            f"--actor.lr_scheduler is {config.actor.lr_scheduler!r}; expected one of {', '.join(schedules)}"
        )
    if not all(0 <= beta < 1 for beta in config.actor.adam.betas):
        found = " ".join(f"{beta:g}" for beta in config.actor.adam.betas)
        raise ConfigError(f"--actor.adam.betas is {found}; expected 2 numbers of at least 0 and less than 1")
    attention = config.ds.attn_implementation
    # A name with a slash is that of a kernel on the hub.
    if attention not in _ATTENTIONS and "/" not in attention:
        guess = difflib.get_close_matches(attention, _ATTENTIONS, n=1)
        raise ConfigError(
            f"--ds.attn_implementation is {attention!r}; expected one of {', '.join(_ATTENTIONS)}"
            + (f"; did you mean {guess[0]}?" if guess else "")
        )
    if config.ds.attn_implementation.startswith("flash_attention") and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            f"--ds.attn_implementation {config.ds.attn_implementation}: flash-attn is not installed; install it, or "
            "use sdpa"
        )
    if config.eval.dataset is not None:
        _check_best_metric(config)


def _check_best_metric(config: Config) -> None:
    available = ["response_tokens", "stop_rate"]
    available += ["rouge_l", LOSS] if config.data.label_key is not None else []
    available += ["accuracy"] if config.eval.checker is not None else []
    wanted = selection_metric(config)
    if wanted not in available:
        raise ConfigError(
            f"--ckpt.best_metric_key is {wanted!r}, expected one of {', '.join(available)}; rouge_l and {LOSS} need "
            "--data.label_key, accuracy needs --eval.checker"
        )


def _check_output_folder(path: Path) -> None:
    existing = existing_parent(path)
    if not existing.is_dir():
        raise ConfigError(f"--ckpt.output_dir {path}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--ckpt.output_dir {path}: {existing} cannot be written to; name another folder")


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
    """What the validation loss is over, where that is not all of the references.

    Raises:
        DataError: the tokenizer has no token that ends a response.
    """
    rows = list(gold_rollouts(table, tokenizer, str(config.data.label_key), config.data.max_len))
    num_cut = sum(row.finish_reason == "length" for row in rows)
    if not num_cut:
        return []
    return [
        f"validation loss: {num_cut} of {len(rows)} references are cut, as rows of training are, where prompt and "
        f"reference have more than {config.data.max_len} tokens (--data.max_len)"
    ]


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


def _warnings(config: Config, stages: Sequence[Stage], needs: Needs, tables: Mapping[str, PromptTable]) -> list[str]:
    found = [
        rf"--{name} holds the two characters \n, not a line break; in bash write $'...\n...'"
        for name, text in _written_by_hand(config).items()
        if "\\n" in (text or "")
    ]
    if makes_rows(config, stages):
        found += teacher_warnings(config, tables["train"])
    if "train" not in stages:
        return found
    found += [f"{option} has no effect without {switch}" for option, switch in _without_effect(config, needs)]
    found += [warning for warning in (unheld_logits(config, needs), trained_temperature(config, needs)) if warning]
    if config.actor.optim == "muon" and config.actor.adam.weight_decay > 0:
        found.append("--actor.adam.weight_decay with --actor.optim muon: biases and norms decay too")
    if config.eval.dataset is None:
        found.append("no --eval.dataset: the student of the last step is kept, whether or not it is the best")
    rows = len(tables["train"].prompts) * (config.rollout.n_samples_per_prompt if needs.rollouts == "teacher" else 1)
    if rows < config.train.batch_size:
        found.append(f"--train.batch_size {config.train.batch_size} is more than the {rows} rows: one step is an epoch")
    return found


def _without_effect(config: Config, needs: Needs) -> list[tuple[str, str]]:
    """Options that are not as by default, and that belong to something which is off; with what turns it on."""
    plain = Config()
    pairs: list[tuple[str, Any, Any, str]] = []
    if config.ds.lora.rank == 0:
        pairs.append(("--ds.lora", config.ds.lora, plain.ds.lora, "--ds.lora.rank"))
    if config.actor.optim != "muon":
        pairs.append(("--actor.muon", config.actor.muon, plain.actor.muon, "--actor.optim muon"))
    found = [
        (f"{section}.{name}", switch)
        for section, given, default, switch in pairs
        for name in type(given).model_fields
        if getattr(given, name) != getattr(default, name)
    ]
    if not config.train.enable_ema and config.train.ema_beta != plain.train.ema_beta:
        found.append(("--train.ema_beta", "--train.enable_ema"))
    if config.train.pretrain_batch_size is not None and not uses_pretrain(config):
        found.append(("--train.pretrain_batch_size", "--data.pretrain_dataset"))
    if not is_remote(config):
        found += [
            (f"--teacher.{name}", "--teacher.api_base")
            for name in TeacherConfig.model_fields
            if name.startswith("api_") and getattr(config.teacher, name) != getattr(plain.teacher, name)
        ]
    if config.eval.test_datasets is None:
        asked = {"--eval.teacher_nll": config.eval.teacher_nll, "--eval.exposure": config.eval.exposure}
        found += [(option, "--eval.test_datasets") for option, given in asked.items() if given]
    return found + _without_effect_online(config.algo.distill, needs)


def _without_effect_online(distill: DistillConfig, needs: Needs) -> list[tuple[str, str]]:
    """Of `_without_effect`, the options that say how rows are made while the student trains."""
    plain = DistillConfig()
    given = [name for name in OnlineOptions.model_fields if getattr(distill, name) != getattr(plain, name)]
    rollout = needs.rollout_of(distill)
    found = {}
    for name in given:
        if name != "mode" and distill.mode == "offline":
            found[name] = "--algo.distill.mode online"
        elif name == "offline_steps" and distill.mode == "online":
            found[name] = "--algo.distill.mode offline_then_online"
        elif name in ("student_fraction", "student_warmup_steps") and rollout != "mixed":
            found[name] = "--algo.distill.rollout mixed"
        elif name in _STUDENT_ROW_OPTIONS and not needs.student_samples(distill):
            found[name] = "--algo.distill.rollout student or mixed"
    return [(f"--algo.distill.{name}", switch) for name, switch in found.items()]


def _written_by_hand(config: Config) -> dict[str, str | None]:
    """Texts that options hold, by the option's name."""
    return {
        "data.input_template": config.data.input_template,
        "teacher.input_template": config.teacher.input_template,
        "teacher.system_prompt": config.teacher.system_prompt,
        "teacher.privileged_template": config.teacher.privileged_template,
    }


def _vocabulary_warnings(models: Mapping[str, ModelFacts]) -> list[str]:
    student = models.get(STUDENT_OPTION)
    teachers = [facts for option, facts in models.items() if option.startswith("--teacher.")]
    largest = max((teacher.vocab_size for teacher in teachers), default=0)
    if student is None or largest <= student.vocab_size:
        return []
    return [
        f"the teacher has {largest} embeddings, the student {student.vocab_size}: padding of the "
        "vocabulary; ids beyond the student's never count"
    ]
