"""Rows of an online job with nobody training: the same engines, plan and store; its steps count as trained at once.

`python3 -m benchmarks._online_rows REPORT FLAG ...` writes the wall-clock time at which each step's rows were sealed.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.cli.flags import parse_config
from openrlhf_bd.driver import job
from openrlhf_bd.driver.cluster import ray_session
from openrlhf_bd.driver.engines import rollout_engines, teacher_engines
from openrlhf_bd.driver.manifests import online_manifest
from openrlhf_bd.driver.models import load_tokenizer, stop_tokens
from openrlhf_bd.driver.producer import Producer
from openrlhf_bd.driver.teacher_data import online_path
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.rollout.plan import RowPlan
from openrlhf_bd.store import StoreWriter


def main() -> None:
    """Make the rows of all steps."""
    report, flags = Path(sys.argv[1]), sys.argv[2:]
    config, _ = parse_config(flags, prog="_online_rows", description="")
    plan = job.check(config)
    student, teacher = str(config.actor.model_name_or_path), str(config.teacher.model_name_or_path)
    tokenizer, stop_ids = load_tokenizer(student, config), stop_tokens(teacher, config)
    prompts = plan.tables["train"]
    needs = resolve_algorithm(config.algo.distill.name).needs_of(config.algo.distill)
    rows = RowPlan(prompts.prompts, config, rollout=needs.rollout_of(config.algo.distill))
    manifest = online_manifest(config, prompts, tokenizer, rows, stop_ids=stop_ids)
    record = RecordOptions(manifest.top_p, manifest.always_include, logprobs=manifest.has_logprobs)
    sealed = []
    with ExitStack() as stack:
        stack.enter_context(ray_session(num_gpus=plan.num_gpus))
        writer = stack.enter_context(StoreWriter(online_path(config), manifest, rows_per_shard=config.train.batch_size))
        teachers = stack.enter_context(
            teacher_engines(config, model=teacher, record=record, num_engines=config.teacher.num_engines)
        )
        students = None
        if needs.student_samples(config.algo.distill):
            students = stack.enter_context(rollout_engines(config, model=student))
        producer = Producer(config, prompts.prompts, rows, writer, teachers=teachers, students=students, trained=0)
        for step in range(1, rows.last_step + 1):
            producer.wait_for_rows(step, on_idle=_nothing)
            sealed.append(time.time())
            producer.trained(step)
            producer.has_weights(step)
    report.write_text(json.dumps(sealed), encoding="utf-8")


def _nothing() -> None:
    """No engine takes another's place here."""


if __name__ == "__main__":
    main()
