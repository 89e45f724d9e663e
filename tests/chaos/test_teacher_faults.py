"""Engines that die, hang or meet a deadly prompt while the teacher generates: real actors, real signals."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from openrlhf_bd.config import Config
from openrlhf_bd.driver.engines import EngineActors, engine_actors
from openrlhf_bd.engines.arguments import RecordOptions, engine_arguments, engine_environment
from openrlhf_bd.errors import ClusterError
from openrlhf_bd.records import Prompt, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter
from openrlhf_bd.teacher.engine import TeacherEngine
from openrlhf_bd.teacher.generate import GenerationStats, generate_teacher_data
from openrlhf_bd.teacher.requests import RolloutRequest
from tests.integration.test_teacher_engine import V, qwen2, save

pytestmark = pytest.mark.chaos

ROOT = str(Path(__file__).parents[2])
TOP_P = 0.8
NUM_PROMPTS = 24


class FaultyTeacher(TeacherEngine):
    """An engine that a row's name stops or kills, and that writes down each time that it did.

    `faults` in its arguments: folder of the record, and the signal a row brings: "once" in the first process that
    meets it, or "always".
    """

    def generate_rollouts(
        self, requests: Sequence[RolloutRequest], *, temperature: float, top_p: float
    ) -> list[Rollout]:
        folder, signals = Path(self.arguments["faults"]["folder"]), self.arguments["faults"]["signals"]
        for request in requests:
            if request.row_id not in signals:
                continue
            number, when = signals[request.row_id]
            record = folder / request.row_id
            fired = record.read_text().splitlines() if record.exists() else []
            if when == "always" or not fired:
                record.write_text("\n".join([*fired, str(os.getpid())]))
                os.kill(os.getpid(), number)
                time.sleep(600)  # A stopped process stands here; a killed one never does.
        return super().generate_rollouts(requests, temperature=temperature, top_p=top_p)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(qwen2(seed=0, num_layers=1, tied=True), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    # Workers cannot import the tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    # A short path: Ray puts Unix sockets below it, whose names may have 107 bytes.
    ray_folder = tempfile.mkdtemp(prefix="bd-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": ROOT}},
        _temp_dir=ray_folder,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(ray_folder, ignore_errors=True)


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(5)
    return [
        Prompt(f"q{index}", rng.integers(10, V, size=rng.integers(1, 20)).astype(np.int32), {})
        for index in range(NUM_PROMPTS)
    ]


def config(**teacher: Any) -> Config:
    return Config.model_validate(
        {
            "rollout": {"max_new_tokens": 12},
            "data": {"max_len": 60},
            "teacher": {"max_num_seqs": 8, **teacher},
            "cluster": {"generate_timeout_s": 20.0, "start_timeout_s": 240.0},
        }
    )


def writer(path: Path) -> StoreWriter:
    manifest = StoreManifest(kind="teacher", top_p=TOP_P, has_logprobs=True, num_prompts=NUM_PROMPTS)
    return StoreWriter(path, manifest, rows_per_shard=8)


def run_job(
    path: Path, model: str, signals: dict[str, tuple[int, str]], *, num_engines: int, options: Config
) -> tuple[GenerationStats, dict[str, list[int]]]:
    """The job on faulty engines: its statistics, and the processes in which each fault fired."""
    folder = path / "faults"
    folder.mkdir(parents=True)
    record = RecordOptions(TOP_P, logprobs=True)
    arguments = engine_arguments(model, max_model_len=60, max_num_seqs=8, seed=0, record=record)
    arguments["faults"] = {"folder": str(folder), "signals": signals}
    try:
        with (
            writer(path / "store") as store,
            engine_actors(
                FaultyTeacher,
                arguments,
                num_engines=num_engines,
                gpus_per_engine=1,
                environment=engine_environment(model),
                timeout_s=240.0,
                what="the engines",
            ) as engines,
        ):
            return _run(engines, store, options), fired(folder)
    finally:
        (path / "fired").write_text(str(fired(folder)))


def _run(engines: EngineActors, store: StoreWriter, options: Config) -> GenerationStats:
    return generate_teacher_data(prompts(), engines.handles, store, config=options, replace_engine=engines.replace)


def fired(folder: Path) -> dict[str, list[int]]:
    return {path.name: [int(line) for line in path.read_text().splitlines()] for path in folder.iterdir()}


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def all_rows() -> set[str]:
    return {f"q{index}:0" for index in range(NUM_PROMPTS)}


def test_killed_engine_is_replaced(cluster: None, model: str, tmp_path: Path) -> None:
    """kill -9 of an engine in the middle of a batch: another takes its place, and every row is there once."""
    stats, faults = run_job(tmp_path, model, {"q5:0": (signal.SIGKILL, "once")}, num_engines=1, options=config())
    assert [len(pids) for pids in faults.values()] == [1]
    assert (stats.rows, stats.replaced_engines, stats.quarantined_rows) == (NUM_PROMPTS, 1, 0)
    assert set(StoreReader(tmp_path / "store").row_ids) == all_rows()
    assert stats.engine_s > 0


def test_stopped_engine_is_ended_and_replaced(cluster: None, model: str, tmp_path: Path) -> None:
    """SIGSTOP of one of two engines: after the time limit its process is ended, and its rows are made by others."""
    stats, faults = run_job(tmp_path, model, {"q2:0": (signal.SIGSTOP, "once")}, num_engines=2, options=config())
    (pids,) = faults.values()
    assert len(pids) == 1
    deadline = time.monotonic() + 60
    while is_running(pids[0]) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not is_running(pids[0])
    assert (stats.rows, stats.replaced_engines) == (NUM_PROMPTS, 1)
    assert set(StoreReader(tmp_path / "store").row_ids) == all_rows()


def test_deadly_prompt_is_quarantined_by_name(cluster: None, model: str, tmp_path: Path) -> None:
    """A prompt that kills every engine is left out and named; all others are there, and the store is complete."""
    stats, faults = run_job(tmp_path, model, {"q7:0": (signal.SIGKILL, "always")}, num_engines=1, options=config())
    # In its batch of two, then alone twice.
    assert len(set(faults["q7:0"])) == 3
    assert (stats.rows, stats.replaced_engines, stats.quarantined_rows) == (NUM_PROMPTS - 1, 3, 1)
    reader = StoreReader(tmp_path / "store")
    assert set(reader.row_ids) == all_rows() - {"q7:0"}
    assert [row.row_id for row in reader.quarantined] == ["q7:0"]
    assert "died" in reader.quarantined[0].reason


def test_budgets_end_the_job_and_keep_its_rows(cluster: None, model: str, tmp_path: Path) -> None:
    """Without room for quarantined rows the job ends, names the row, and the rows made so far stay."""
    with pytest.raises(ClusterError, match=r"row q7:0 ended two engines by itself.*max_quarantined_rows is 0"):
        run_job(
            tmp_path,
            model,
            {"q7:0": (signal.SIGKILL, "always")},
            num_engines=1,
            options=config(max_quarantined_rows=0),
        )
    assert "q7:0" in (tmp_path / "fired").read_text()
    reader = StoreReader(tmp_path / "store", require_complete=False)
    assert set(reader.row_ids) == all_rows() - {"q7:0"}


def test_engines_that_always_die_end_the_job(cluster: None, model: str, tmp_path: Path) -> None:
    """Where every batch kills its engine the job ends after three, says how, and does not try for ever."""
    signals = {f"q{index}:0": (signal.SIGKILL, "always") for index in range(NUM_PROMPTS)}
    with pytest.raises(ClusterError, match=r"3 teacher engines were lost before any row came back.*it died"):
        run_job(tmp_path, model, signals, num_engines=1, options=config())
    assert len(StoreReader(tmp_path / "store", require_complete=False)) == 0
