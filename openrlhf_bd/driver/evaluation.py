"""The final evaluation: every test set, every seed, one or several models through the same engines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from openrlhf_bd.config import Config
from openrlhf_bd.data.prompts import PromptTable, load_evaluation_prompts, parse_test_datasets
from openrlhf_bd.driver.cluster import wait_for
from openrlhf_bd.driver.engines import EngineActors, student_engines, teacher_engines
from openrlhf_bd.driver.models import load_tokenizer
from openrlhf_bd.driver.progress import stage_progress
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.evaluation.checker import load_checker
from openrlhf_bd.evaluation.evaluate import evaluate_model, num_units
from openrlhf_bd.evaluation.results import Evaluation


def load_test_sets(config: Config, tokenizer_path: str) -> dict[str, PromptTable]:
    """The test sets of `--eval.test_datasets`, by name."""
    tokenizer = load_tokenizer(tokenizer_path, config)
    return {
        name: load_evaluation_prompts(config, tokenizer, spec=spec, purpose="test")
        for name, spec in parse_test_datasets(config.eval.test_datasets or "").items()
    }


def evaluate_models(config: Config, models: Mapping[str, Path]) -> list[Evaluation]:
    """Evaluate models on all test sets, one after another in the same engines.

    Args:
        config: `eval.*` says how; `teacher.model_name_or_path` scores the samples where `eval.teacher_nll` is on.
        models: folder of each model by its label.

    Returns:
        One evaluation a model, in the given order.
    """
    first = next(iter(models.values()))
    tokenizer = load_tokenizer(str(first), config)
    tests = load_test_sets(config, str(first))
    checker = load_checker(config.eval.checker) if config.eval.checker else None
    scorer: AbstractContextManager[EngineActors | None] = (
        teacher_engines(config, record=RecordOptions(top_p=None), num_engines=1)
        if config.eval.teacher_nll
        else nullcontext()
    )
    units = sum(
        num_units(len(table.prompts), config=config, teacher=config.eval.teacher_nll) for table in tests.values()
    )
    evaluations = []
    with student_engines(config, model=str(first)) as engines, scorer as teacher:
        for label, path in models.items():
            wait_for(
                [engine.load.remote(str(path)) for engine in engines],
                timeout_s=config.cluster.start_timeout_s,
                what=f"the engines to load {path}",
            )
            with stage_progress(f"evaluate {label}", units, "responses") as progress:
                results = {
                    name: evaluate_model(
                        engines,
                        table.prompts,
                        dataset_name=name,
                        config=config,
                        tokenizer=tokenizer,
                        checker=checker,
                        teacher=teacher.handles[0] if teacher else None,
                        on_progress=progress.advance,
                    )
                    for name, table in tests.items()
                }
            evaluations.append(Evaluation.from_results(label, str(path), results))
    return evaluations
