"""The final evaluation: every test set, every seed, one or several models through the same engines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.data.prompts import PromptTable, load_evaluation_prompts, parse_test_datasets
from openrlhf_bd.data.teacher_view import scoring_view
from openrlhf_bd.driver.engines import EngineActors, student_engines, teacher_engines
from openrlhf_bd.driver.models import load_tokenizer
from openrlhf_bd.driver.progress import stage_progress
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.evaluation.checker import load_checker
from openrlhf_bd.evaluation.evaluate import evaluate_model, num_units
from openrlhf_bd.evaluation.results import Evaluation
from openrlhf_bd.rollout.calls import wait_for


def load_test_sets(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, PromptTable]:
    """The test sets of `--eval.test_datasets`, by name; with the teacher's own prompts where it scores responses.

    Raises:
        ConfigError: a response could be too long for the teacher.
    """
    teacher = None
    if config.eval.teacher_nll:
        model = config.teacher.model_name_or_path
        # A teacher behind a server has the student's tokenizer, as preflight has seen.
        teacher = scoring_view(config, tokenizer, tokenizer if model is None else load_tokenizer(model, config))
    tables = {
        name: load_evaluation_prompts(config, tokenizer, spec=spec, purpose="test", teacher=teacher)
        for name, spec in parse_test_datasets(config.eval.test_datasets or "").items()
    }
    for name, table in tables.items():
        _check_room_to_score(config, name, table)
    return tables


def _check_room_to_score(config: Config, name: str, table: PromptTable) -> None:
    """A response has room beside the teacher's prompt as well, however long it gets."""
    limit, length = config.eval.max_new_tokens or config.data.max_len, teacher_length(config)
    for prompt in table.prompts:
        num_seen = len(prompt.seen_by_teacher)
        num_new = min(limit, config.data.max_len - len(prompt.token_ids))
        if num_seen + num_new > length:
            raise ConfigError(
                f"--eval.teacher_nll: prompt {prompt.prompt_id} of test set {name} has {num_seen} tokens as the "
                f"teacher sees it and a response of up to {num_new}, expected at most {length} together; raise "
                "--teacher.max_len, or lower --eval.max_new_tokens"
            )


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
    tests = load_test_sets(config, tokenizer)
    checker = load_checker(config.eval.checker) if config.eval.checker else None
    scorer: AbstractContextManager[EngineActors | None] = (
        teacher_engines(
            config, model=str(config.teacher.model_name_or_path), record=RecordOptions(top_p=None), num_engines=1
        )
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
