"""Checks of a job's options among themselves, before any model or data is looked at."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from transformers import SchedulerType

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import prompt_limit, teacher_length
from openrlhf_bd.data.test_sets import parse_test_datasets
from openrlhf_bd.driver.evaluation_checks import check_sampling
from openrlhf_bd.driver.objective import check_colocation, check_kd_ratio, check_live_teacher_of, check_online
from openrlhf_bd.driver.remote_teacher import check_remote_options
from openrlhf_bd.driver.resources import Stage
from openrlhf_bd.driver.selection import LOSS, selection_metric
from openrlhf_bd.errors import ConfigError, StoreError
from openrlhf_bd.evaluation.checker import load_checker
from openrlhf_bd.paths import existing_parent
from openrlhf_bd.store.folder import open_folder

# Schedules that ask for more than the number of a step, which does not reach them: a metric, or steps of the decay.
_OTHER_SCHEDULES = ("greedy", "reduce_lr_on_plateau", "warmup_stable_decay")
_ATTENTIONS = (
    *("auto", "sdpa", "eager", "flex_attention"),
    *("flash_attention_2", "flash_attention_3", "flash_attention_4"),
)


def check_options(config: Config, stages: Sequence[Stage], needs: Needs) -> None:
    """Options among themselves, and against what the algorithm needs.

    Args:
        config: the job.
        stages: that it runs.
        needs: of its algorithm.

    Raises:
        ConfigError: two contradict each other, or one cannot be what it is.
    """
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
    if "evaluate" in stages:
        check_sampling(config)
    if "train" in stages:
        _check_recorded(config, needs)
        _check_training_options(config)
        check_live_teacher_of(config, needs)
        check_online(config, needs)
        check_colocation(config, needs)


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


def _check_output_folder(path: Path) -> None:
    existing = existing_parent(path)
    if not existing.is_dir():
        raise ConfigError(f"--ckpt.output_dir {path}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--ckpt.output_dir {path}: {existing} cannot be written to; name another folder")


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
