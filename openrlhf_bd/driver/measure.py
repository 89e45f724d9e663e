"""A short sample of the teacher's data, by the engines and the writer of the real job."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.config import Config
from openrlhf_bd.data.routes import DEFAULT_TEACHER, is_routed, teacher_models, teacher_option
from openrlhf_bd.driver.cluster import cluster_device, ray_session
from openrlhf_bd.driver.engine_limits import check_head_sizes
from openrlhf_bd.driver.engines import teacher_engines
from openrlhf_bd.driver.estimate import Call, Estimate, Sample, Written, estimate
from openrlhf_bd.driver.manifests import record_options
from openrlhf_bd.driver.measured import MeasuredPlan
from openrlhf_bd.driver.model_files import STUDENT_OPTION, ModelFacts
from openrlhf_bd.driver.models import stop_tokens
from openrlhf_bd.driver.plan import Plan
from openrlhf_bd.driver.progress import console
from openrlhf_bd.driver.rank_memory import held_teacher_bytes, rank_bytes
from openrlhf_bd.driver.remote_teacher import is_remote
from openrlhf_bd.driver.resources import Stage, check_cluster, takes_part
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.records import Prompt, Rollout
from openrlhf_bd.rollout.calls import wait_for
from openrlhf_bd.store import StoreManifest, StoreReader, StoreSummary, StoreWriter, summary
from openrlhf_bd.store.manifest import TEACHER_PREFIX, TEACHER_PROMPTS
from openrlhf_bd.teacher.requests import RolloutRequest, rollout_requests

# Two calls of different size and two shards of different size are made of them.
MIN_ROWS = 8
# The first rows wait for what an engine does once; their time does not count.
_WARM_UP_ROWS = 2


def check_measured(config: Config, stages: Sequence[Stage]) -> None:
    """Refuse a job of which a sample by an engine of the teacher says nothing.

    Raises:
        ConfigError: the message says why.
    """
    distill = config.algo.distill
    if distill.mode == "online":
        raise ConfigError(
            "--measure generates rows as they are made before training, and with --algo.distill.mode online all of "
            "them are made while the student trains; leave it out, or give --algo.distill.mode offline for a bound of "
            "the teacher's part"
        )
    if is_remote(config):
        raise ConfigError(
            f"--measure starts an engine of the teacher, and with --teacher.api_base {config.teacher.api_base} the "
            "teacher runs elsewhere; leave it out, and see the rate and the time left that the job itself shows"
        )
    if "generate" not in stages:
        raise ConfigError("--measure tells what the teacher's data will take, and this command makes none")
    needs = resolve_algorithm(distill.name).needs_of(distill)
    if needs.rows_by_teacher and needs.rollouts == "gold":
        raise ConfigError(
            f"--measure tells what responses of the teacher will take, and with --algo.distill.name {distill.name} "
            "--algo.distill.responses gold it scores the data set's own; leave it out"
        )
    if not takes_part("generate", config, needs):
        raise ConfigError(
            f"--measure: with --algo.distill.name {distill.name} the teacher generates nothing; leave it out"
        )


def measured_plan(config: Config, plan: Plan, *, num_rows: int) -> MeasuredPlan:
    """What a job will take, from a sample of its rows: see `measure`."""
    estimates = measure(config, plan, num_rows=num_rows)
    trains = any(stage.name == "train" for stage in plan.stages)
    return MeasuredPlan(
        plan=plan,
        estimates=estimates,
        num_engines=config.teacher.num_engines,
        rank_bytes=_rank_bytes(config, plan.models) if trains else None,
        driver_bytes=psutil.Process().memory_info().rss,
    )


def _rank_bytes(config: Config, models: Mapping[str, ModelFacts]) -> int | None:
    """Memory of a student rank, with the teacher where it holds one."""
    needs = resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill)
    own = rank_bytes(config, models.get(STUDENT_OPTION))
    held = held_teacher_bytes(config, needs, models.get(teacher_option(DEFAULT_TEACHER)))
    return None if own is None or held is None else own + held


def measure(config: Config, plan: Plan, *, num_rows: int) -> dict[str, Estimate]:
    """Generate rows of each teacher by one engine, and estimate what all of them will take.

    Args:
        config: the job.
        plan: of its checks.
        num_rows: rows to generate, of each teacher; fewer where its part of the job is smaller.

    Returns:
        An estimate by the name of each teacher.

    Raises:
        ConfigError: too few rows are asked for.
        ResourceError, ClusterError: no engine could be started, or it gave no answer.
    """
    one = config.model_copy(update={"teacher": config.teacher.model_copy(update={"num_engines": 1})})
    found = {}
    with ray_session(num_gpus=config.teacher.tensor_parallel_size) as resources:
        check_cluster(one, resources, stages=("generate",))
        check_head_sizes(one, plan.models, device=cluster_device(), stages=("generate",))
        for name, model in teacher_models(config).items():
            prompts = [prompt for prompt in plan.tables["train"].prompts if prompt.teacher in (name, None)]
            if prompts:
                found[name] = estimate(
                    _sample(model, _requests(prompts, num_rows, config), config),
                    num_rows=len(prompts) * config.rollout.n_samples_per_prompt,
                    num_engines=config.teacher.num_engines,
                    max_num_seqs=config.teacher.max_num_seqs,
                    rows_per_shard=config.teacher.rows_per_shard,
                )
    return found


def spread(prompts: Sequence[Prompt], num: int, *, seed: int) -> list[Prompt]:
    """Some of the prompts, in random order: one of each of `num` equal parts of the prompts sorted by length.

    So short and long prompts are represented as in the data set, and the same seed draws the same prompts.
    """
    by_length = sorted(prompts, key=lambda prompt: len(prompt.seen_by_teacher))
    random = np.random.default_rng(seed)
    num = min(num, len(prompts))
    edges = np.linspace(0, len(prompts), num + 1).astype(int)
    drawn = [by_length[random.integers(start, end)] for start, end in pairwise(edges)]
    return [drawn[place] for place in random.permutation(num)]


def _requests(prompts: Sequence[Prompt], num: int, config: Config) -> list[RolloutRequest]:
    """One row of each prompt that is drawn, then a second one of each, up to `num` rows."""
    drawn = spread(prompts, num, seed=config.train.seed)
    by_prompt = [list(rollout_requests([prompt], config=config)) for prompt in drawn]
    found = [request for sample in zip(*by_prompt, strict=True) for request in sample][:num]
    if len(found) < MIN_ROWS:
        raise ConfigError(
            f"--measure {num}: the sample has {len(found)} rows, expected at least {MIN_ROWS}; ask for more, or, if "
            "the teacher has no more, let the job run: it is as short as its sample"
        )
    return found


def _sample(model: str, requests: Sequence[RolloutRequest], config: Config) -> Sample:
    record = record_options(config, stop_ids=stop_tokens(model, config))
    started = time.monotonic()
    with teacher_engines(config, model=model, record=record, num_engines=1) as engines:
        start_s = time.monotonic() - started
        console.print(f"[dim]generating {len(requests)} rows[/dim]", highlight=False)
        (engine,) = engines.handles
        rows, calls = _generate(engine, requests, config)
        state = wait_for(engine.ready.remote(), timeout_s=config.cluster.start_timeout_s, what="the engine's state")
    raw_bytes = [_raw_bytes(row) for row in rows]
    half = len(rows) // 2
    written, found = _write(rows, config, record)
    written_half, _ = _write(rows[:half], config, record)
    return Sample(
        lengths_N=np.array([len(row.response_ids) for row in rows]),
        raw_bytes_N=np.array(raw_bytes),
        written=(Written(sum(raw_bytes[:half]), written_half), Written(sum(raw_bytes), written)),
        calls=calls,
        summary=found,
        start_s=start_s,
        engine_bytes=state["rss_bytes"],
        cache_bytes=state.get("kv_cache_bytes"),
    )


def _generate(
    engine: Any, requests: Sequence[RolloutRequest], config: Config
) -> tuple[list[Rollout], tuple[Call, ...]]:
    """The rows, in three calls: to warm up, a quarter of the others, and the rest."""
    quarter = _WARM_UP_ROWS + max(1, (len(requests) - _WARM_UP_ROWS) // 4)
    parts = (requests[:_WARM_UP_ROWS], requests[_WARM_UP_ROWS:quarter], requests[quarter:])
    rows: list[Rollout] = []
    calls = []
    for part in parts:
        started = time.monotonic()
        ref = engine.generate_rollouts.remote(
            list(part), temperature=config.rollout.temperature, top_p=config.rollout.top_p
        )
        generated: list[Rollout] = wait_for(ref, timeout_s=config.cluster.generate_timeout_s, what="a sample of rows")
        lengths = [len(row.response_ids) for row in generated]
        calls.append(Call(len(part), sum(lengths), max(lengths), time.monotonic() - started))
        rows += generated
    return rows, tuple(calls[1:])


def _write(rows: Sequence[Rollout], config: Config, record: RecordOptions) -> tuple[int, StoreSummary]:
    """Bytes and summary of a store of these rows, in a folder that is removed."""
    manifest = StoreManifest(
        kind="teacher",
        fingerprints=_name_keys(rows, config),
        top_p=record.top_p,
        always_include=record.always_include,
        has_logprobs=record.logprobs,
        num_prompts=len(rows),
    )
    with tempfile.TemporaryDirectory(prefix="openrlhf-bd-measure-") as folder:
        path = Path(folder) / "rows"
        with StoreWriter(path, manifest, rows_per_shard=len(rows)) as writer:
            writer.append(rows)
        reader = StoreReader(path)
        return reader.size_bytes, summary(reader)


def _name_keys(rows: Sequence[Rollout], config: Config) -> dict[str, str]:
    """Fingerprints that decide which columns there are; their values are of no use here."""
    found = {TEACHER_PROMPTS: ""} if rows[0].teacher_prompt_hash is not None else {}
    if is_routed(config):
        found |= {TEACHER_PREFIX + name: "" for name in teacher_models(config)}
    return found


def _raw_bytes(row: Rollout) -> int:
    """Bytes of a row's arrays as the store's columns have them: ids of 4 bytes, float16 in the sets."""
    num_tokens = len(row.prompt_ids) + 2 * len(row.response_ids)
    if row.sets is None:
        return 4 * num_tokens
    bytes_per_candidate = 4 if row.sets.logprobs_M is None else 6
    return 4 * num_tokens + 6 * row.sets.num_states + bytes_per_candidate * len(row.sets.ids_M)
