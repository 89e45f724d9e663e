"""The main job, Algorithm 1 of the paper: teacher's data, student, evaluation, report; resumable stage by stage."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from openrlhf_bd.algorithms.base import Needs
from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.config import Config
from openrlhf_bd.data.pretrain import write_pretrain_blocks
from openrlhf_bd.data.routes import teacher_models
from openrlhf_bd.driver.cluster import cluster_device, ray_session
from openrlhf_bd.driver.engine_limits import check_head_sizes
from openrlhf_bd.driver.evaluation import evaluate_models
from openrlhf_bd.driver.loggers import log_evaluation
from openrlhf_bd.driver.manifests import online_manifest, wanted_manifest
from openrlhf_bd.driver.models import load_tokenizer, stop_tokens
from openrlhf_bd.driver.nodes import check_nodes
from openrlhf_bd.driver.objective import incomplete_sets, unheld_logits
from openrlhf_bd.driver.online import OnlineInputs, train_online
from openrlhf_bd.driver.plan import Plan
from openrlhf_bd.driver.preflight import preflight
from openrlhf_bd.driver.progress import console
from openrlhf_bd.driver.resources import STAGES, Stage, check_cluster, stage_gpus
from openrlhf_bd.driver.run_folder import CONFIG_FILE, RunFolder, run_identity
from openrlhf_bd.driver.schedule import offline_schedule, online_schedule, shuffled_schedule
from openrlhf_bd.driver.selection import validates_by_loss
from openrlhf_bd.driver.teacher_data import (
    check_rows,
    is_complete_store,
    make_rows,
    online_path,
    rows_path,
    write_validation_rows,
)
from openrlhf_bd.driver.timeline import driver_span, recorded
from openrlhf_bd.driver.training import TrainingInputs, selected_folder, train_student
from openrlhf_bd.errors import RunFolderError
from openrlhf_bd.evaluation.checker import load_checker
from openrlhf_bd.evaluation.report import write_report
from openrlhf_bd.evaluation.run_data import RunData
from openrlhf_bd.evaluation.tables import main_table, terminal_table
from openrlhf_bd.rollout.plan import RowPlan
from openrlhf_bd.store import StoreReader, summary
from openrlhf_bd.store.folder import StorePath, open_folder
from openrlhf_bd.store.manifest import StoreState
from openrlhf_bd.student.actor import ACTOR_FOLDER
from openrlhf_bd.student.checkpoints import newest_tag
from openrlhf_bd.student.row_source import RowStores
from openrlhf_bd.student.strategy import checkpoint_folder

REPORT_FILE = "report.html"


def check(config: Config, *, stages: Sequence[Stage] = STAGES) -> Plan:
    """Everything that can be known to be wrong before an actor starts.

    Raises:
        BDError: with exit status 2, or 74 where rows of an earlier run are damaged; nothing has been written.
    """
    path = Path(config.ckpt.output_dir)
    RunFolder.check(path, run_identity(config))
    plan = preflight(config, stages=stages)
    if "generate" in stages or ("train" in stages and "training" not in RunFolder.finished_stages(path)):
        _check_rows(config, plan)
    return plan


def run(config: Config, *, resolved_config: str, plan: Plan, stages: Sequence[Stage] = STAGES) -> Path:
    """Run or resume a job whose `check` passed.

    Args:
        config: the job.
        resolved_config: the configuration as YAML, kept in the run folder.
        plan: of `check`.
        stages: what to do of: teacher's data, student, evaluation.

    Returns:
        The run folder: the selected student at its top, with metrics, evaluation, report and configuration.

    Raises:
        ResourceError: the cluster is too small, or its nodes do not see the same files; nothing was written.
        BDError: see each stage. What was finished is kept, and the same command goes on from there.
    """
    path = Path(config.ckpt.output_dir)
    with _session(config, plan, stages), RunFolder.open(path, run_identity(config)) as folder, recorded(path):
        (path / CONFIG_FILE).write_text(resolved_config, encoding="utf-8")
        if "train" in stages:
            _claim_checkpoints(config, folder)
            _train(config, plan, folder)
        elif "generate" in stages:
            rows = _rows(config, plan, folder, load_tokenizer(_any_teacher(config), config))
            console.print(f"rows: {rows} (openrlhf-bd inspect shows them)", highlight=False)
        if "evaluate" in stages and config.eval.test_datasets:
            _evaluate(config, folder)
            _show_scores(folder)
        if "train" in stages:
            _report(folder)
    return path


@contextmanager
def _session(config: Config, plan: Plan, stages: Sequence[Stage]) -> Iterator[None]:
    """A Ray session that is large enough, unless everything that needs one is finished."""
    needed = {"training"} if "train" in stages else {"rows"} if "generate" in stages else set()
    if "evaluate" in stages and config.eval.test_datasets:
        needed.add("evaluation")
    if "rows" in needed and _rows_lack(config):
        needed.add("missing rows")
    if needed <= RunFolder.finished_stages(Path(config.ckpt.output_dir)):
        yield
        return
    with ray_session(num_gpus=plan.num_gpus) as resources:
        check_cluster(config, resources, stages=stages)
        check_head_sizes(config, plan.models, device=cluster_device(), stages=stages)
        for line in check_nodes(config, plan):
            console.print(line, highlight=False, markup=False)
        yield


def _rows_lack(config: Config) -> bool:
    """Whether a finished store lost rows to a repair."""
    path = rows_path(config, resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill))
    state = StoreState.find(open_folder(path))
    return state is not None and not state.complete


def _claim_checkpoints(config: Config, folder: RunFolder) -> None:
    """A run resumes from its own checkpoints; from another's only if it was told to.

    Raises:
        RunFolderError: `--ckpt.path` holds checkpoints that this run has not written.
    """
    if folder.finished("checkpoints"):
        return
    path = checkpoint_folder(config)
    tag = newest_tag(path / ACTOR_FOLDER)
    if tag is not None and not config.ckpt.load_enable:
        raise RunFolderError(
            f"--ckpt.path {path}: found checkpoint {tag} of another run; give --ckpt.load_enable to start from it, or "
            "name another folder. Nothing was changed"
        )
    folder.finish("checkpoints", path=str(path))


def _train(config: Config, plan: Plan, folder: RunFolder) -> None:
    """Rows and training, unless an earlier run has finished both."""
    if folder.finished("training"):
        say_reused("student", str(folder.path))
        return
    tokenizer = load_tokenizer(str(config.actor.model_name_or_path), config)
    mode = config.algo.distill.mode
    finished = None if mode == "online" else _rows(config, plan, folder, tokenizer)
    reader = None if finished is None else StoreReader(finished)
    online = None
    if mode != "offline":
        online = _online_inputs(config, plan, tokenizer, reader)
        stores = RowStores(
            str(finished) if finished else None, str(online.path), offline_steps=online.plan.first_step - 1
        )
        schedule = online_schedule(online.plan)
    else:
        assert reader is not None
        stores, schedule = RowStores(str(finished)), offline_schedule(config, reader)
    if validates_by_loss(config):
        validation = write_validation_rows(config, plan.tables["validation"], tokenizer)
        stores = replace(stores, validation=None if validation is None else str(validation))
    inputs = TrainingInputs(
        stores=stores,
        schedule=schedule,
        pretrain_path=_pretrain_blocks(config, tokenizer, folder, num_steps=schedule.total),
        validation=plan.tables["validation"].prompts if "validation" in plan.tables else [],
        tokenizer=tokenizer,
        stop_ids=stop_tokens(str(config.actor.model_name_or_path), config),
        checker=load_checker(config.eval.checker) if config.eval.checker else None,
    )
    needs = resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill)
    for warning in (unheld_logits(config, needs), incomplete_sets(config, needs)):
        if warning:
            console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)
    started = time.monotonic()
    record = train_student(config, inputs) if online is None else train_online(config, inputs, online)
    if online is not None:
        folder.finish("rows", path=str(online.path), seconds=0.0, gpus=0)
    folder.finish("training", **record, **_spent(started, gpus=stage_gpus(config, "train")))
    # Only now: a run that was killed before would look for it.
    selection = record["selection"]
    shutil.rmtree(selected_folder(config, selection["tag"] if selection else None))


def _online_inputs(
    config: Config, plan: Plan, tokenizer: PreTrainedTokenizerBase, reader: StoreReader | None
) -> OnlineInputs:
    """What the online steps make rows from.

    Args:
        config: the job.
        plan: of its checks.
        tokenizer: of teacher and student.
        reader: of the finished rows that the first steps read, or None.
    """
    offline_steps = 0
    if reader is not None:
        offline_steps = config.algo.distill.offline_steps or shuffled_schedule(config, len(reader)).per_epoch
    prompts, teacher = plan.tables["train"], _any_teacher(config)
    needs = resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill)
    rollout = needs.rollout_of(config.algo.distill)
    row_plan = RowPlan(prompts.prompts, config, rollout=rollout, offline_steps=offline_steps)
    manifest = online_manifest(config, prompts, tokenizer, row_plan, stop_ids=stop_tokens(teacher, config))
    return OnlineInputs(prompts.prompts, row_plan, online_path(config), manifest, teacher)


def _check_rows(config: Config, plan: Plan) -> None:
    """Refuse rows of an earlier run that are damaged, or not what this one needs."""
    needs, model = _row_source(config)
    tokenizer = load_tokenizer(model, config)
    if config.algo.distill.mode == "online":
        online = _online_inputs(config, plan, tokenizer, None)
        check_rows(online.path, online.manifest, need_sets=needs.candidate_sets)
        return
    stop_ids = stop_tokens(model, config)
    path = rows_path(config, needs)
    manifest = wanted_manifest(config, needs, plan.tables["train"], tokenizer, stop_ids=stop_ids)
    check_rows(path, manifest, need_sets=needs.candidate_sets)
    # Until these rows are finished there are no online ones after them.
    if config.algo.distill.mode == "offline_then_online" and is_complete_store(path):
        online = _online_inputs(config, plan, tokenizer, StoreReader(path))
        check_rows(online.path, online.manifest, need_sets=needs.candidate_sets)


def _rows(config: Config, plan: Plan, folder: RunFolder, tokenizer: PreTrainedTokenizerBase) -> StorePath:
    needs, model = _row_source(config)
    started = time.monotonic()
    rows = make_rows(config, needs, plan.tables["train"], tokenizer, stop_ids=stop_tokens(model, config))
    if rows.reused:
        say_reused("rows", str(rows.path))
    if folder.finished("rows") is None:
        is_generated = needs.rollouts == "teacher" and not rows.reused
        gpus = stage_gpus(config, "generate") if is_generated else 0
        folder.finish("rows", path=str(rows.path), **_spent(started, gpus=gpus))
    return rows.path


def _spent(started: float, *, gpus: int) -> dict[str, float]:
    """What a stage took, for the run's record: seconds with the start of its actors, and the GPUs that it held.

    Args:
        started: monotonic seconds.
        gpus: in Ray's books; on machines without any they are only numbers.
    """
    return {"seconds": round(time.monotonic() - started, 1), "gpus": gpus}


def _row_source(config: Config) -> tuple[Needs, str]:
    """What the algorithm reads, and the model whose tokenizer and stop tokens its rows have."""
    needs = resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill)
    return needs, _any_teacher(config) if needs.rows_by_teacher else str(config.actor.model_name_or_path)


def _any_teacher(config: Config) -> str:
    """A model with the teachers' tokenizer and stop tokens: preflight saw that all have the same.

    A teacher behind a server has those of the student.
    """
    models = [*teacher_models(config).values(), config.actor.model_name_or_path]
    return str(models[0])


def _pretrain_blocks(
    config: Config, tokenizer: PreTrainedTokenizerBase, folder: RunFolder, *, num_steps: int
) -> Path | None:
    """Pre-training text as blocks, no more of it than the steps read."""
    if config.data.pretrain_dataset is None or config.algo.distill.pretrain_coef == 0:
        return None
    path = folder.path / "pretrain.npy"
    num_blocks = num_steps * (config.train.pretrain_batch_size or config.train.batch_size)
    write_pretrain_blocks(config, tokenizer, path, config.data.max_len, max_blocks=num_blocks)
    return path


def _evaluate(config: Config, folder: RunFolder) -> None:
    """The student on all test sets, unless an earlier run has done it."""
    if folder.finished("evaluation"):
        say_reused("evaluation", str(folder.path))
        return
    started = time.monotonic()
    training = folder.finished("training")
    model = folder.path if training else Path(str(config.actor.model_name_or_path))
    label = method_label(config) if training else model.name
    with driver_span("evaluate"):
        evaluation = evaluate_models(config, {label: model}, files={label: folder.path})[0]
    folder.finish("evaluation", **_spent(started, gpus=stage_gpus(config, "evaluate")))
    log_evaluation(config, folder.path, evaluation, step=training["selected_step"] if training else 0)


def _show_scores(folder: RunFolder) -> None:
    """A table of each test set on the terminal."""
    run = RunData.load(folder.path)
    assert run.evaluation is not None  # it was written, or found, just before
    for dataset in run.evaluation.datasets:
        console.print(terminal_table(main_table([(run.label, run.evaluation)], dataset)))


def _report(folder: RunFolder) -> None:
    """The HTML report in the run folder."""
    run = RunData.load(folder.path)
    rows = folder.finished("rows")
    assert rows is not None  # training finished after it
    write_report(
        [run],
        folder.path / REPORT_FILE,
        title=f"{run.label}: {folder.path.name}",
        store_summary=summary(StoreReader(rows["path"])),
    )
    console.print(f"student: {folder.path}\nreport:  {folder.path / REPORT_FILE}", highlight=False)


def method_label(config: Config) -> str:
    """Name of the method in tables: "bd:robust", "seqkd"."""
    distill = config.algo.distill
    return f"bd:{distill.preset}" if distill.name == "bd" else distill.name


def say_reused(what: str, where: str) -> None:
    """Tell that an earlier run's result is used."""
    console.print(f"[dim]reused[/dim] {what} of an earlier run: {where}", highlight=False)
