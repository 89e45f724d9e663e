"""The objective's options beside what a run has: what is refused before an actor starts, and what is warned of."""

from __future__ import annotations

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.config import Config
from openrlhf_bd.data.routes import is_routed
from openrlhf_bd.driver.teacher_data import rows_path
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.rollout.flow import check_flow
from openrlhf_bd.store import StoreReader, incomplete_share, one_token_share
from openrlhf_bd.store.folder import open_folder
from openrlhf_bd.store.manifest import StoreState


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


def check_live_teacher_of(config: Config, needs: Needs) -> None:
    """Refuse an algorithm that needs the teacher in the ranks where there is none to put there.

    Raises:
        ConfigError: the message names the options to change.
    """
    if not needs.live_teacher:
        return
    teacher, wanted = config.teacher, f"--algo.distill.name {config.algo.distill.name} with a teacher in each rank"
    other = "name the model (--teacher.model_name_or_path), or use --algo.distill.kd_support sets"
    if teacher.api_base is not None:
        raise ConfigError(f"{wanted}: --teacher.api_base {teacher.api_base} names a server, which holds it; {other}")
    if is_routed(config):
        raise ConfigError(f"{wanted}: --teacher.routes names several, and a rank holds one; {other}")
    if teacher.model_name_or_path is None:
        raise ConfigError(f"{wanted}: --teacher.model_name_or_path is not given; {other}")


def check_online(config: Config, needs: Needs) -> None:
    """Refuse what an online run cannot do.

    Raises:
        ConfigError: the message names the options to change.
    """
    distill = config.algo.distill
    if distill.mode == "offline":
        _check_whose_rows(config, needs)
        return
    if config.train.row_order == "recorded":
        raise ConfigError(
            f"--train.row_order recorded repeats the steps of an earlier online run, and --algo.distill.mode is "
            f"{distill.mode}; use --algo.distill.mode offline with that run's store as --teacher.store_path"
        )
    if needs.rollouts != "teacher":
        raise ConfigError(
            f"--algo.distill.name {distill.name} learns from the data set's own responses, so there is nothing to make "
            f"while it trains; use --algo.distill.mode offline instead of {distill.mode}"
        )
    if is_routed(config):
        raise ConfigError(
            f"--teacher.routes with --algo.distill.mode {distill.mode}: an online run has one teacher; make the rows "
            "of several with --algo.distill.mode offline"
        )
    if distill.mode == "offline_then_online":
        _check_whose_rows(config, needs)
    samples = needs.student_samples(distill)
    if samples and needs.student_rollouts == "never":
        raise ConfigError(
            f"--algo.distill.name {distill.name} learns from the teacher's responses alone; use --algo.distill.rollout "
            "teacher"
        )
    if not samples and needs.student_rollouts == "required":
        raise ConfigError(
            f"--algo.distill.name {distill.name} learns from the student's own responses; use --algo.distill.rollout "
            "student, or mixed with --algo.distill.student_fraction above 0"
        )
    if samples:
        check_flow(distill)
    if distill.teacher_mix > 0 and config.teacher.api_base is not None:
        raise ConfigError(
            f"--algo.distill.teacher_mix {distill.teacher_mix:g} takes tokens from the teacher's own engines, and "
            f"--teacher.api_base {config.teacher.api_base} names a server; use --algo.distill.teacher_mix 0, or "
            "--teacher.model_name_or_path"
        )
    if distill.teacher_mix > 0 and (config.rollout.temperature, config.rollout.top_p) != (1.0, 1.0):
        raise ConfigError(
            f"--algo.distill.teacher_mix {distill.teacher_mix:g} mixes the two models at temperature 1, and "
            f"--rollout.temperature is {config.rollout.temperature:g}, --rollout.top_p {config.rollout.top_p:g}; use 1 "
            "for both"
        )


def check_colocation(config: Config, needs: Needs) -> None:
    """Refuse engines that cannot share the ranks' GPUs.

    Raises:
        ConfigError: the message names the options to change.
    """
    if not config.train.colocate_all:
        return
    distill, num_engines = config.algo.distill, config.vllm.num_engines or 1
    if distill.mode == "offline" or not needs.student_samples(distill):
        raise ConfigError(
            "--train.colocate_all is for the student's engines of an online run, and this run has none; use "
            "--algo.distill.mode online with --algo.distill.rollout student or mixed"
        )
    num_ranks = config.actor.num_nodes * config.actor.num_gpus_per_node
    if config.vllm.tensor_parallel_size > 1 or num_engines > num_ranks:
        raise ConfigError(
            f"--train.colocate_all puts one engine on a rank's GPU: found {num_engines} engines of "
            f"{config.vllm.tensor_parallel_size} GPUs for {num_ranks} ranks; use --vllm.tensor_parallel_size 1 and "
            f"--vllm.num_engines {num_ranks} or less"
        )


def _check_whose_rows(config: Config, needs: Needs) -> None:
    """Refuse offline rows of which the algorithm cannot learn."""
    name, path = config.algo.distill.name, rows_path(config, needs)
    state = StoreState.find(open_folder(path))
    manifest = None if state is None else state.manifest
    has_student_rows = manifest is not None and manifest.online and manifest.sampling.get("rollout") != "teacher"
    if needs.student_rollouts == "required" and not has_student_rows:
        raise ConfigError(
            f"--algo.distill.name {name} learns from the student's own responses, which {path} does not have; use "
            "--algo.distill.mode online, or name the rows of an online run (--teacher.store_path)"
        )
    if needs.student_rollouts == "never" and has_student_rows:
        raise ConfigError(
            f"--algo.distill.name {name} learns from the teacher's responses alone, and {path} also has a student's; "
            "name another --teacher.store_path"
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
    if StoreState.find(open_folder(path)) is None:
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
    if tau == 1 or not (needs.candidate_sets or needs.live_teacher):
        return None
    return (
        f"--algo.distill.tau {tau:g}: the policy that is trained is softmax(z / tau), which the saved student samples "
        f"from at temperature {tau:g}; --eval.temperature is {config.eval.temperature:g}"
    )


def incomplete_sets(config: Config, needs: Needs) -> str | None:
    """A warning where sets of the run's store hold less than p, as a server told too few tokens; else None.

    Raises:
        StoreError: the store that is there is damaged.
    """
    path, top_p = rows_path(config, needs), config.algo.distill.top_p
    if not needs.candidate_sets or StoreState.find(open_folder(path)) is None:
        return None
    reader = StoreReader(path, require_complete=False)
    share = incomplete_share(reader, top_p=top_p)
    if not share:
        return None
    return (
        f"{share:.1%} of the candidate sets of {path} are incomplete: the {reader.manifest.max_candidates} likeliest "
        f"tokens hold less than --algo.distill.top_p {top_p:g}. There the sets are these tokens and P is their mass; "
        "generate the data again with a larger --teacher.api_top_logprobs, or lower top_p"
    )
