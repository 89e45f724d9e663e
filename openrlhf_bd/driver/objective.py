"""The objective's options beside what a run has: what is refused before an actor starts, and what is warned of."""

from __future__ import annotations

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config
from openrlhf_bd.driver.teacher_data import rows_path
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.store import StoreReader, one_token_share
from openrlhf_bd.store.manifest import MANIFEST_FILE


def uses_pretrain(config: Config) -> bool:
    """Whether J_PT is part of the loss."""
    return config.data.pretrain_dataset is not None and config.algo.distill.pretrain_coef > 0


def check_kd_ratio(config: Config) -> None:
    """Refuse a share of the teacher in J_PT without a teacher, or without J_PT.

    Raises:
        ConfigError: the message names the options to change.
    """
    ratio = config.algo.distill.kd_ratio
    if ratio == 0:
        return
    if config.teacher.model_name_or_path is None:
        raise ConfigError(
            f"--algo.distill.kd_ratio {ratio} takes this share of J_PT from a live teacher, and "
            "--teacher.model_name_or_path is not given; name the teacher, or use --algo.distill.kd_ratio 0"
        )
    if not uses_pretrain(config):
        raise ConfigError(
            f"--algo.distill.kd_ratio {ratio} is a share of J_PT, and this run has none; give --data.pretrain_dataset "
            "(with --algo.distill.pretrain_coef above 0), or use --algo.distill.kd_ratio 0"
        )


def unheld_logits(config: Config, needs: Needs) -> str | None:
    """A warning where no term of a bd run's loss sees the logits outside the candidate sets; else None.

    Where the run's store exists, the warning tells the share of sets of a single token: the projected policy is 1
    there whatever the student thinks, so the likelihood part is silent too.

    Raises:
        StoreError: the store that is there is damaged.
    """
    distill = config.algo.distill
    if distill.name != "bd" or distill.tail_coef > 0 or distill.top_p == 1 or uses_pretrain(config):
        return None
    text = (
        "nothing holds the logits outside the candidate sets: the student may put mass on tokens that the teacher "
        "excludes. Give --data.pretrain_dataset, or --algo.distill.tail_coef 1"
    )
    path = rows_path(config, needs)
    if not (path / MANIFEST_FILE).exists():
        return text
    reader = StoreReader(path, require_complete=False)
    always_include = reader.manifest.always_include if distill.include_eos else ()
    share = one_token_share(reader, top_p=distill.top_p, always_include=always_include)
    if share is None:
        return text
    return (
        f"{text}. With the rows of {path}, {share:.1%} of the sets are a single token, where the projected policy is 1 "
        "whatever the student thinks"
    )


def trained_temperature(config: Config, needs: Needs) -> str | None:
    """A warning where the policy that is trained, softmax(z / tau), is not the one that is sampled from; else None."""
    tau = config.algo.distill.tau
    if tau == 1 or not needs.candidate_sets:
        return None
    return (
        f"--algo.distill.tau {tau:g}: the policy that is trained is softmax(z / tau), which the saved student samples "
        f"from at temperature {tau:g}; --eval.temperature is {config.eval.temperature:g}"
    )
