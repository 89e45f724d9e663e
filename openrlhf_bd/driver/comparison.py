"""Several models on the same test sets, each evaluated into a file of its own in one folder; resumable."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from openrlhf_bd.config import Config
from openrlhf_bd.driver.cluster import ray_session
from openrlhf_bd.driver.evaluation import evaluate_models
from openrlhf_bd.driver.evaluation_checks import check_models
from openrlhf_bd.driver.model_files import inspect_model
from openrlhf_bd.driver.models import load_tokenizer
from openrlhf_bd.driver.nodes import check_nodes
from openrlhf_bd.driver.plan import Plan
from openrlhf_bd.driver.preflight import preflight
from openrlhf_bd.driver.progress import console
from openrlhf_bd.driver.resources import Stage, check_cluster
from openrlhf_bd.driver.run_folder import CONFIG_FILE, RunFolder, run_identity
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.evaluation.models import EvaluatedModel
from openrlhf_bd.evaluation.results import labelled_paths
from openrlhf_bd.evaluation.tables import main_table, terminal_table

_STAGES: tuple[Stage, ...] = ("evaluate",)


def check_comparison(config: Config, models: Mapping[str, str]) -> Plan:
    """Everything that can be known to be wrong before an engine starts. Nothing is written.

    Args:
        config: how models are evaluated; `actor.model_name_or_path` stays unset.
        models: by label, see `evaluation.models.parse_models`.

    Raises:
        BDError: with exit status 2.
    """
    if config.actor.model_name_or_path is not None:
        raise ConfigError("--actor.model_name_or_path beside --models: give the model a label in --models as well")
    folder = Path(config.ckpt.output_dir)
    labelled_paths(folder, models)
    RunFolder.check(folder, _identity(config))
    plan = check_evaluated(config, models)
    stages = tuple(
        replace(stage, rows=stage.rows * len(models), tokens=stage.tokens * len(models), files=_files(folder, models))
        for stage in plan.stages
    )
    return replace(plan, stages=stages)


def check_evaluated(config: Config, models: Mapping[str, str]) -> Plan:
    """Check models and test sets, with the tokenizer of the first model, which must be that of all.

    Args:
        config: how models are evaluated.
        models: by label.

    Raises:
        BDError: with exit status 2.
    """
    paths = _paths(models)
    first = next(iter(paths.values()))
    for label, path in paths.items():
        inspect_model(path, option=f"model {label!r}", trust_remote_code=config.trust_remote_code)
    actor = config.actor.model_copy(update={"model_name_or_path": first})
    plan = preflight(config.model_copy(update={"actor": actor}), stages=_STAGES)
    check_models(config, paths, load_tokenizer(first, config))
    return plan


def check_machines(config: Config, models: Mapping[str, str], plan: Plan) -> None:
    """Check that every node of the session sees models and folders, and that actors fit into the GPUs.

    Args:
        config: how models are evaluated.
        models: by label.
        plan: of `check_evaluated`.

    Raises:
        ResourceError, ClusterError: see `check_nodes`; nothing was written.
    """
    for line in check_nodes(config, plan, _paths(models)):
        console.print(line, highlight=False, markup=False)


def run_comparison(config: Config, models: Mapping[str, str], *, resolved_config: str, plan: Plan) -> Path:
    """Evaluate the models that have no evaluation in the folder yet, and print a table of each test set.

    Args:
        config: as of `check_comparison`.
        models: by label.
        resolved_config: the configuration as YAML, kept in the folder.
        plan: of `check_comparison`.

    Returns:
        The folder (`--ckpt.output_dir`): LABEL.json and LABEL.responses.jsonl of each model.

    Raises:
        ResourceError: the cluster is too small, or its nodes do not see the same files; nothing was written.
        BDError: see `evaluate_models`. The same command goes on with the models that are left.
    """
    folder = Path(config.ckpt.output_dir)
    files = labelled_paths(folder, models)
    are_done = all(path.exists() for path in files.values())
    session = nullcontext() if are_done else ray_session(num_gpus=plan.num_gpus)
    with session as resources:
        if resources is not None:
            check_cluster(config, resources, stages=_STAGES)
            check_machines(config, models, plan)
        with RunFolder.open(folder, _identity(config)):
            (folder / CONFIG_FILE).write_text(resolved_config, encoding="utf-8")
            found = list(zip(models, evaluate_models(config, models, files=files), strict=True))
    datasets = dict.fromkeys(name for _, evaluation in found for name in evaluation.datasets)
    for dataset in datasets:
        console.print(terminal_table(main_table(found, dataset)))
    console.print(f"evaluations: {folder}", highlight=False)
    return folder


def _paths(models: Mapping[str, str]) -> dict[str, str]:
    return {label: EvaluatedModel.parse(text).path for label, text in models.items()}


def _files(folder: Path, models: Mapping[str, str]) -> str:
    return ", ".join(str(path) for path in labelled_paths(folder, models).values())


def _identity(config: Config) -> dict[str, Any]:
    """What must be equal for a later evaluation to reuse this one's files. Models may come and go."""
    return {**run_identity(config), "stage": "evaluate"}
