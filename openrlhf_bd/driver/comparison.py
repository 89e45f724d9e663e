"""Several models on the same test sets, each evaluated into a file of its own in one folder; resumable."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from openrlhf_bd.config import Config
from openrlhf_bd.driver.cluster import ray_session
from openrlhf_bd.driver.evaluation import evaluate_models
from openrlhf_bd.driver.evaluation_checks import check_models
from openrlhf_bd.driver.models import load_tokenizer
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
    paths = {label: EvaluatedModel.parse(text).path for label, text in models.items()}
    first = next(iter(paths.values()))
    actor = config.actor.model_copy(update={"model_name_or_path": first})
    plan = preflight(config.model_copy(update={"actor": actor}), stages=_STAGES)
    check_models(config, paths, load_tokenizer(first, config))
    return plan


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
        ResourceError: the cluster is too small; nothing was written.
        BDError: see `evaluate_models`. The same command goes on with the models that are left.
    """
    folder = Path(config.ckpt.output_dir)
    files = labelled_paths(folder, models)
    are_done = all(path.exists() for path in files.values())
    session = nullcontext() if are_done else ray_session(num_gpus=plan.num_gpus)
    with session as resources, RunFolder.open(folder, _identity(config)):
        if resources is not None:
            check_cluster(config, resources, stages=_STAGES)
        (folder / CONFIG_FILE).write_text(resolved_config, encoding="utf-8")
        found = list(zip(models, evaluate_models(config, models, files=files), strict=True))
    datasets = dict.fromkeys(name for _, evaluation in found for name in evaluation.datasets)
    for dataset in datasets:
        console.print(terminal_table(main_table(found, dataset)))
    console.print(f"evaluations: {folder}", highlight=False)
    return folder


def _identity(config: Config) -> dict[str, Any]:
    """What must be equal for a later evaluation to reuse this one's files. Models may come and go."""
    return {**run_identity(config), "stage": "evaluate"}
