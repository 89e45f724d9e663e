"""Warnings of a plan: what is allowed and probably not meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config, DistillConfig, OnlineOptions, TeacherConfig
from openrlhf_bd.data.prompts import PromptTable
from openrlhf_bd.driver.model_files import STUDENT_OPTION, ModelFacts
from openrlhf_bd.driver.objective import trained_temperature, unheld_logits, uses_pretrain
from openrlhf_bd.driver.remote_teacher import is_remote
from openrlhf_bd.driver.resources import Stage, makes_rows
from openrlhf_bd.driver.teachers import teacher_warnings

# What concerns the student's own rows alone.
_STUDENT_ROW_OPTIONS = ("teacher_mix", "max_staleness", "stale_rows", "in_flight", "sync_steps")


def job_warnings(config: Config, stages: Sequence[Stage], needs: Needs, tables: Mapping[str, PromptTable]) -> list[str]:
    """Options without effect, and data and objectives that are rarely meant.

    Args:
        config: the job.
        stages: that it runs.
        needs: of its algorithm.
        tables: its prompts: train, validation, and the test sets.
    """
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


def vocabulary_warnings(models: Mapping[str, ModelFacts]) -> list[str]:
    """A teacher with more embeddings than the student.

    Args:
        models: by the option that names each.
    """
    student = models.get(STUDENT_OPTION)
    teachers = [facts for option, facts in models.items() if option.startswith("--teacher.")]
    largest = max((teacher.vocab_size for teacher in teachers), default=0)
    if student is None or largest <= student.vocab_size:
        return []
    return [
        f"the teacher has {largest} embeddings, the student {student.vocab_size}: padding of the "
        "vocabulary; ids beyond the student's never count"
    ]


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
