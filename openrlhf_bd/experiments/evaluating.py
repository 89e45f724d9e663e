"""Evaluation stages: one file of scores for each model; a model that was evaluated before is not evaluated again."""

from __future__ import annotations

import json
from pathlib import Path

from openrlhf_bd.cli.flags import resolved_yaml
from openrlhf_bd.driver.evaluation import evaluate_models
from openrlhf_bd.driver.job import say_reused
from openrlhf_bd.driver.run_folder import CONFIG_FILE, RUN_FILE, RunFolder, run_identity
from openrlhf_bd.evaluation.results import labelled_paths, responses_path
from openrlhf_bd.experiments.stages import Stage
from openrlhf_bd.store.files import write_text

# In the identity of a stage's folder: what decides the scores of each model, by label.
_MODELS = "models"


def evaluation_finished(stage: Stage) -> bool:
    """Whether every model of a stage was evaluated."""
    return all(path.exists() for path in labelled_paths(stage.folder, stage.models).values())


def evaluate_stage(stage: Stage) -> None:
    """Evaluate the models of a stage that have no scores yet: neither here, nor of equal options in a folder beside.

    Raises:
        BDError: see `evaluate_models`. Each model's scores are kept as soon as they are there.
    """
    identity = {**run_identity(stage.config), _MODELS: dict(stage.model_keys)}
    files = labelled_paths(stage.folder, stage.models)
    with RunFolder.open(stage.folder, identity):
        (stage.folder / CONFIG_FILE).write_text(resolved_yaml(stage.config), encoding="utf-8")
        for label, file in files.items():
            if not file.exists() and (earlier := _earlier(stage, label)) is not None:
                # The responses first: scores that are there are finished.
                for source, target in ((responses_path(earlier), responses_path(file)), (earlier, file)):
                    write_text(target, source.read_text(encoding="utf-8"))
                say_reused(f"evaluation of {label}", str(earlier))
        evaluate_models(stage.config, stage.models, files=files)


def _earlier(stage: Stage, label: str) -> Path | None:
    """The scores of a model in the folder of another stage."""
    for run_file in sorted(stage.folder.parent.glob(f"*/{RUN_FILE}")):
        models = json.loads(run_file.read_text(encoding="utf-8"))["identity"].get(_MODELS, {})
        if run_file.parent != stage.folder and models.get(label) == stage.model_keys[label]:
            file = labelled_paths(run_file.parent, [label])[label]
            if file.exists():
                return file
    return None
