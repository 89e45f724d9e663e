"""The final evaluation: every test set, sampler and seed, one or several models through the same engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayTaskError
from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.data.limits import teacher_length
from openrlhf_bd.data.prompts import PromptTable, load_evaluation_prompts
from openrlhf_bd.data.teacher_view import scoring_view
from openrlhf_bd.data.test_sets import parse_test_datasets
from openrlhf_bd.driver.engines import engine_actors, student_engines, teacher_engines
from openrlhf_bd.driver.evaluation_checks import check_models, check_sampling, uses_teacher
from openrlhf_bd.driver.models import load_tokenizer
from openrlhf_bd.driver.progress import console, stage_progress
from openrlhf_bd.engines.actor import Completion
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.errors import ConfigError, DataError, RunFolderError
from openrlhf_bd.evaluation.checker import Checker, load_checker
from openrlhf_bd.evaluation.evaluate import evaluate_test_sets, is_plain_sampling, num_units
from openrlhf_bd.evaluation.exposure import ExposureMeter, teacher_answers
from openrlhf_bd.evaluation.exposure_models import ExposureModels
from openrlhf_bd.evaluation.models import EvaluatedModel
from openrlhf_bd.evaluation.results import Evaluation, evaluation_path, write_responses
from openrlhf_bd.evaluation.scored import TestData
from openrlhf_bd.rollout.calls import wait_for
from openrlhf_bd.store.fingerprints import fingerprint_model_folder


def load_test_sets(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, PromptTable]:
    """The test sets of `--eval.test_datasets`, by name; with the teacher's own prompts where it looks at responses.

    Raises:
        ConfigError: options of the evaluation contradict each other, or a response could be too long for the teacher.
        DataError: a record cannot be evaluated; the message names file and line.
    """
    check_sampling(config)
    teacher = None
    if uses_teacher(config):
        model = config.teacher.model_name_or_path
        # A teacher behind a server has the student's tokenizer, as preflight has seen.
        teacher = scoring_view(config, tokenizer, tokenizer if model is None else load_tokenizer(model, config))
    tables = {
        name: load_evaluation_prompts(
            test_set.configured(config), tokenizer, spec=test_set.path, purpose="test", teacher=teacher
        )
        for name, test_set in parse_test_datasets(config.eval.test_datasets or "").items()
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
            option = "teacher_nll" if config.eval.teacher_nll else "exposure"
            raise ConfigError(
                f"--eval.{option}: prompt {prompt.prompt_id} of test set {name} has {num_seen} tokens as the "
                f"teacher sees it and a response of up to {num_new}, expected at most {length} together; raise "
                "--teacher.max_len, or lower --eval.max_new_tokens"
            )
        if config.eval.exposure and num_seen >= config.data.max_len:
            raise ConfigError(
                f"--eval.exposure: prompt {prompt.prompt_id} of test set {name} has {num_seen} tokens as the teacher "
                f"sees it, expected fewer than --data.max_len {config.data.max_len}, which the engines hold that "
                "sample the teacher's responses; raise it"
            )


def evaluate_models(
    config: Config, models: Mapping[str, str | Path], *, files: Mapping[str, Path] | None = None
) -> list[Evaluation]:
    """Evaluate models on all test sets, one after another in the same engines.

    Args:
        config: `eval.*` says how; `teacher.model_name_or_path` scores the samples where `eval.teacher_nll` is on, and
            stands beside each model where `eval.exposure` is.
        models: folder or hub name of each model by its label, in the form of `EvaluatedModel.parse`.
        files: where each label's evaluation is written as soon as it is done, with all responses beside it: the path
            of a `.json` file, or of a run folder. A model whose file is there is not evaluated again.

    Returns:
        One evaluation a model, in the given order.

    Raises:
        ConfigError, DataError: options, a model or a record is not what it must be; no engine has started.
        RunFolderError: a file holds the evaluation of another model; nothing was changed.
        ClusterError: an engine died or did not answer in time; evaluations that were finished are on disk.
    """
    files = files or {}
    chosen = {label: EvaluatedModel.parse(str(model)) for label, model in models.items()}
    found = {
        label: earlier
        for label, model in chosen.items()
        if label in files and (earlier := _earlier(label, model, files[label], config)) is not None
    }
    waiting = {label: model for label, model in chosen.items() if label not in found}
    if waiting:
        for label, evaluation in _evaluated(config, waiting, files):
            found[label] = evaluation
    return [found[label] for label in chosen]


def _earlier(label: str, model: EvaluatedModel, file: Path, config: Config) -> Evaluation | None:
    """The evaluation that an earlier run has written, or None.

    Raises:
        RunFolderError: it is that of another model.
    """
    path = evaluation_path(file)
    if not path.exists():
        return None
    evaluation = Evaluation.read(path)
    is_same_model = evaluation.fingerprint in (None, fingerprint_model_folder(model.path))
    temperatures = {scores.temperature for scores in evaluation.datasets.values()}
    if not is_same_model or temperatures != {_configured(config, model).eval.temperature}:
        raise RunFolderError(
            f"{path}: holds the evaluation of another model than {label}={model.path}, of other weights, or at another "
            "temperature; give this one another label, name another folder, or take the file away. Nothing was changed"
        )
    console.print(f"[dim]reused[/dim] evaluation of {label}: {path}", highlight=False)
    return evaluation


def _configured(config: Config, model: EvaluatedModel) -> Config:
    if model.temperature is None:
        return config
    return config.model_copy(update={"eval": config.eval.model_copy(update={"temperature": model.temperature})})


def _evaluated(
    config: Config, models: Mapping[str, EvaluatedModel], files: Mapping[str, Path]
) -> Iterator[tuple[str, Evaluation]]:
    """Each model's evaluation, written before the next model's begins."""
    tokenizer = load_tokenizer(next(iter(models.values())).path, config)
    check_models(config, {label: model.path for label, model in models.items()}, tokenizer)
    tests = load_test_sets(config, tokenizer)
    checker = load_checker(config.eval.checker) if config.eval.checker else None
    with _hosts(config, models, tests) as hosts:
        for label, model in models.items():
            evaluation = _evaluate(_configured(config, model), label, model, hosts, tests, tokenizer, checker, files)
            yield label, evaluation


class _Engines:
    """The engines that sample, and which model they host."""

    def __init__(self, handles: Sequence[Any], model: str, config: Config) -> None:
        self.handles, self._model, self._timeout_s = handles, model, config.cluster.start_timeout_s

    def host(self, model: str) -> None:
        """Switch to a model, unless it is there."""
        if model != self._model:
            _load(model, self.handles, timeout_s=self._timeout_s)
            self._model = model


def _load(model: str, actors: Sequence[Any], *, timeout_s: float) -> None:
    """Let actors load a model.

    Raises:
        DataError: they cannot.
        ClusterError: one died, or was not ready in time.
    """
    try:
        wait_for([actor.load.remote(model) for actor in actors], timeout_s=timeout_s, what=f"{model} to load")
    except RayTaskError as error:
        reason = (str(error.cause).strip().splitlines() or [""])[0]
        raise DataError(
            f"{model}: cannot be loaded ({type(error.cause).__name__}: {reason}); mend the model, or leave it out. "
            "Evaluations that were finished before are on disk"
        ) from error


@dataclass(frozen=True, slots=True)
class _Hosts:
    """Actors of an evaluation: engines, the teacher that scores, and the models and meter of exposure, or None."""

    engines: _Engines
    teacher: Any | None
    exposure: Any | None
    meter: ExposureMeter | None


@contextmanager
def _hosts(config: Config, models: Mapping[str, EvaluatedModel], tests: Mapping[str, PromptTable]) -> Iterator[_Hosts]:
    first = next(iter(models.values())).path
    teacher_name = str(config.teacher.model_name_or_path)
    with ExitStack() as stack:
        start = teacher_name if config.eval.exposure else first
        engines = _Engines(stack.enter_context(student_engines(config, model=start)), start, config)
        teacher = exposure = meter = None
        if config.eval.teacher_nll:
            record = RecordOptions(top_p=None)
            teacher = stack.enter_context(
                teacher_engines(config, model=teacher_name, record=record, num_engines=1)
            ).handles[0]
        if config.eval.exposure:
            actors = engine_actors(
                ExposureModels,
                config,
                num_engines=1,
                gpus_per_engine=1,
                environment={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                timeout_s=config.cluster.start_timeout_s,
                what="teacher and student of --eval.exposure",
                lane=None,
            )
            exposure = stack.enter_context(actors).handles[0]
            meter = ExposureMeter(exposure, _teacher_answers(engines, tests, config), config)
        yield _Hosts(engines, teacher, exposure, meter)


def _teacher_answers(
    engines: _Engines, tests: Mapping[str, PromptTable], config: Config
) -> dict[str, list[list[Completion]]]:
    """The teacher's own responses, once for all models."""
    units = sum(len(table.prompts) for table in tests.values()) * len(config.eval.seeds)
    with stage_progress("the teacher's own responses", units, "responses") as progress:
        prompts = {name: table.prompts for name, table in tests.items()}
        return teacher_answers(engines.handles, prompts, config, on_progress=progress.advance)


def _evaluate(
    config: Config,
    label: str,
    model: EvaluatedModel,
    hosts: _Hosts,
    tables: Mapping[str, PromptTable],
    tokenizer: PreTrainedTokenizerBase,
    checker: Checker | None,
    files: Mapping[str, Path],
) -> Evaluation:
    """One model on all test sets."""
    hosts.engines.host(model.path)
    if hosts.exposure is not None and any(is_plain_sampling(config, top_p) for top_p in config.eval.test_top_p):
        _load(model.path, [hosts.exposure], timeout_s=config.cluster.start_timeout_s)
    own_keys = parse_test_datasets(config.eval.test_datasets or "")
    tests = {
        name: TestData(table.prompts, own_keys[name].configured(config), table.num_dropped)
        for name, table in tables.items()
    }
    top_ps, use_teacher = config.eval.test_top_p, hosts.teacher is not None
    units = sum(
        num_units(len(test.prompts), config=config, teacher=use_teacher, top_ps=top_ps, exposure=config.eval.exposure)
        for test in tests.values()
    )
    with stage_progress(f"evaluate {label}", units, "responses") as progress:
        results = evaluate_test_sets(
            hosts.engines.handles,
            tests,
            top_ps=top_ps,
            config=config,
            tokenizer=tokenizer,
            checker=checker,
            teacher=hosts.teacher,
            meter=hosts.meter,
            on_progress=progress.advance,
        )
    evaluation = Evaluation.from_results(label, model.path, results, fingerprint=fingerprint_model_folder(model.path))
    if label in files:
        # The responses first: an evaluation that is there is finished.
        write_responses(files[label], (response for result in results.values() for response in result.responses))
        evaluation.write(files[label])
    return evaluation
