"""Engines that die, hang or meet a deadly prompt while the teacher generates: real actors, real signals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from openrlhf_bd.config import Config
from openrlhf_bd.driver.engines import engine_actors
from openrlhf_bd.engines.arguments import RecordOptions, engine_arguments, engine_environment
from openrlhf_bd.errors import ClusterError
from openrlhf_bd.records import Prompt, Rollout
from openrlhf_bd.store import StoreManifest, StoreReader, StoreWriter, verify_store
from openrlhf_bd.teacher.engine import TeacherEngine
from openrlhf_bd.teacher.generate import GenerationStats, generate_teacher_data
from openrlhf_bd.teacher.requests import RolloutRequest
from openrlhf_bd.teacher.work import Sampling
from tests.integration.test_teacher_engine import V, qwen2, save

pytestmark = pytest.mark.chaos

ROOT = str(Path(__file__).parents[2])
TOP_P = 0.8
NUM_PROMPTS = 24
ROWS_PER_SHARD = 8
# A batch has two rows: an engine decodes 8 sequences at once, and gets at least a quarter of that.
BATCH_ROWS = 2
MID_BATCH_S = 0.01
ENGINES = "engines"


@dataclass(frozen=True)
class Fault:
    """What a row brings to the engine that is asked for it.

    Attributes:
        signal: sent to the engine's process in the middle of the batch; None: the engine raises an error instead.
        to_child: the signal goes to the engine's last worker process, before the batch.
        always: each time that the row is asked for; else the first time only.
    """

    signal: signal.Signals | None
    to_child: bool = False
    always: bool = False


@dataclass(frozen=True)
class Fired:
    """A fault that fired.

    Attributes:
        pids: the engine's process and its children at that moment.
        sealed: shards that lay in the store, with the SHA-256 of each.
    """

    pids: list[int]
    sealed: dict[str, str]


class FaultyTeacher(TeacherEngine):
    """An engine that rows stop, kill or break, and that writes down each time that one did, just before it does.

    `faults` in its arguments: folder of the record, folder of the store, and the fault of each row.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__(arguments)
        engine = {"pid": os.getpid(), "shared": [str(path) for path in shared_memory()]}
        with (Path(arguments["faults"]["folder"]) / ENGINES).open("a") as file:
            file.write(json.dumps(engine) + "\n")

    def generate_rollouts(
        self, requests: Sequence[RolloutRequest], *, temperature: float, top_p: float
    ) -> list[Rollout]:
        faults = self.arguments["faults"]
        fault = next((self._fire(request.row_id) for request in requests if request.row_id in faults["rows"]), None)
        rollouts = super().generate_rollouts(requests, temperature=temperature, top_p=top_p)
        if fault is not None and not fault.to_child:
            time.sleep(600)  # A stopped process stands here, or before; a killed one never does.
        return rollouts

    def _fire(self, row_id: str) -> Fault | None:
        faults = self.arguments["faults"]
        fault, record = faults["rows"][row_id], Path(faults["folder"]) / row_id
        if record.exists() and not fault.always:
            return None
        children = [child.pid for child in psutil.Process().children(recursive=True)]
        fired = {"pids": [os.getpid(), *children], "sealed": shard_hashes(Path(faults["store"]))}
        with record.open("a") as file:
            file.write(json.dumps(fired) + "\n")
        if fault.signal is None:
            raise RuntimeError("the test's own failure")
        if fault.to_child:
            os.kill(children[-1], fault.signal)
        else:
            threading.Timer(MID_BATCH_S, os.kill, (os.getpid(), fault.signal)).start()
        return fault


def shared_memory() -> set[Path]:
    """What this process and its children share by name, and have not given back."""
    processes = [psutil.Process(), *psutil.Process().children()]
    paths = {Path(region.path) for process in processes for region in process.memory_maps()}
    return {path for path in paths if path.parent == Path("/dev/shm") and path.exists()}


def shard_hashes(store: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(store.glob("shard-*.parquet"))}


@dataclass(frozen=True)
class Teacher:
    """A store being made by engines with faults."""

    model: str
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def run(
        self, rows: dict[str, Fault], *, num_engines: int = 1, tensor_parallel_size: int = 1, **options: Any
    ) -> GenerationStats:
        """Make the rows that are missing. `options` are those of `--teacher.*`."""
        record = self.folder / "fired"
        record.mkdir(exist_ok=True)
        arguments = engine_arguments(
            self.model,
            max_model_len=60,
            max_num_seqs=4 * BATCH_ROWS,
            seed=0,
            tensor_parallel_size=tensor_parallel_size,
            record=RecordOptions(TOP_P, logprobs=True),
        )
        arguments["faults"] = {"folder": str(record), "store": str(self.store), "rows": rows}
        manifest = StoreManifest(kind="teacher", top_p=TOP_P, has_logprobs=True, num_prompts=NUM_PROMPTS)
        with (
            StoreWriter(self.store, manifest, ROWS_PER_SHARD) as store,
            engine_actors(
                FaultyTeacher,
                arguments,
                num_engines=num_engines,
                gpus_per_engine=tensor_parallel_size,
                environment=engine_environment(self.model),
                timeout_s=240.0,
                what="the engines",
            ) as engines,
        ):
            work = Sampling(prompts(), config(**options))
            return generate_teacher_data(
                work, engines.handles, store, config=work.config, replace_engine=engines.replace
            )

    def fired(self) -> dict[str, list[Fired]]:
        """Each row whose fault fired, with each time that it did."""
        return {
            path.name: [Fired(**json.loads(line)) for line in path.read_text().splitlines()]
            for path in sorted((self.folder / "fired").iterdir())
            if path.name != ENGINES
        }

    def engines(self) -> dict[int, list[Path]]:
        """Process of each engine that started, with the memory that it shared."""
        lines = (self.folder / "fired" / ENGINES).read_text().splitlines()
        return {engine["pid"]: [Path(path) for path in engine["shared"]] for engine in map(json.loads, lines)}

    def require_whole(self, *, without: Sequence[str] = ()) -> None:
        """Every row is there once, shards are what they were at each fault, and nothing is left of lost engines."""
        reader = StoreReader(self.store)
        verify_store(reader.path)
        assert sorted(reader.row_ids) == sorted({f"q{index}:0" for index in range(NUM_PROMPTS)} - set(without))
        at_the_end = shard_hashes(self.store)
        for fired in (each for times in self.fired().values() for each in times):
            assert fired.sealed.items() <= at_the_end.items()
            require_gone(fired.pids)
        assert {path.name for path in self.store.iterdir()} == {".lock", "manifest.json", "shards.jsonl", *at_the_end}


def require_gone(pids: Sequence[int], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while running := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"processes {running} of a lost engine are still there"
        time.sleep(0.2)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
            "teacher": {"max_num_seqs": 4 * BATCH_ROWS, **teacher},
            "cluster": {"generate_timeout_s": 15.0, "start_timeout_s": 240.0},
        }
    )


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


@pytest.fixture
def teacher(cluster: None, model: str, tmp_path: Path) -> Teacher:
    return Teacher(model, tmp_path)


def test_lost_engines_are_replaced(teacher: Teacher) -> None:
    """An engine killed before any row is sealed, one killed just after, one that fails: others take their places.

    One engine, batches of two, shards of eight. Rows that were lost come last, so the writer has
    q0-q3 when q4 and q5 are lost: 4 in its buffer, none sealed;
    q0-q3, q6-q9 when q10 and q11 are lost: all sealed, in one shard;
    four more when q16 and q17 are lost: one shard, and 4 in its buffer.
    """
    killed = Fault(signal.SIGKILL)
    stats = teacher.run({"q5:0": killed, "q10:0": killed, "q17:0": Fault(None)})
    assert {row: [len(each.sealed) for each in times] for row, times in teacher.fired().items()} == {
        "q10:0": [1],
        "q17:0": [1],
        "q5:0": [0],
    }
    assert (stats.rows, stats.replaced_engines, stats.quarantined_rows) == (NUM_PROMPTS, 3, 0)
    assert stats.engine_s > 0
    teacher.require_whole()


def test_stopped_engine_is_ended_and_replaced(teacher: Teacher) -> None:
    """SIGSTOP of one of two engines: after the time limit its process is ended, and its rows are made by others."""
    stats = teacher.run({"q17:0": Fault(signal.SIGSTOP)}, num_engines=2)
    ((fired,),) = teacher.fired().values()
    # At most two of the sixteen rows before it are with the other engine, which goes on meanwhile.
    assert len(fired.sealed) >= 1
    assert (stats.rows, stats.replaced_engines) == (NUM_PROMPTS, 1)
    teacher.require_whole()


def test_lost_workers_of_a_parallel_engine(teacher: Teacher, caplog: pytest.LogCaptureFixture) -> None:
    """An engine over two processes: one of them killed, then one stopped. Each time the whole engine is replaced.

    No process of it is left. An engine that ends in peace gives back the memory that its processes share; of one that
    is lost some of it stays.
    """
    rows = {"q5:0": Fault(signal.SIGKILL, to_child=True), "q10:0": Fault(signal.SIGSTOP, to_child=True)}
    stats = teacher.run(rows, tensor_parallel_size=2)
    fired = teacher.fired()
    assert {row: [len(each.sealed) for each in times] for row, times in fired.items()} == {"q10:0": [1], "q5:0": [0]}
    # The actor, two workers, and what Python starts beside them.
    assert all(len(each.pids) >= 3 for (each,) in fired.values())
    assert (stats.rows, stats.replaced_engines) == (NUM_PROMPTS, 2)
    assert "a worker process of the engine died" in caplog.text
    teacher.require_whole()
    engines = list(teacher.engines().values())
    # vLLM's CPU collectives have segments of their own, which stay where a busy machine lets workers end too slowly.
    queues = [path for path in engines[-1] if path.name.startswith("psm_")]
    assert queues
    assert not [path for path in queues if path.exists()]
    for path in (path for shared in engines for path in shared):
        path.unlink(missing_ok=True)


def test_deadly_prompts_are_quarantined_by_name(teacher: Teacher) -> None:
    """Prompts that kill every engine are left out and named; the budget holds, and the list outlives the job.

    The same job again asks for the other rows alone, and counts those that were given up before.
    """
    deadly = Fault(signal.SIGKILL, always=True)
    rows = {"q6:0": deadly, "q7:0": deadly}
    with pytest.raises(ClusterError, match=r"row q7:0 ended two engines by itself.*max_quarantined_rows is 1"):
        teacher.run(rows, max_quarantined_rows=1)
    # Together once, then each alone twice. In a batch the first row fires.
    assert [len(times) for times in teacher.fired().values()] == [3, 2]
    unfinished = StoreReader(teacher.store, require_complete=False)
    assert (len(unfinished), [row.row_id for row in unfinished.quarantined]) == (NUM_PROMPTS - 2, ["q6:0"])
    sealed = shard_hashes(teacher.store)

    with pytest.raises(ClusterError, match=r"row q7:0 .*max_quarantined_rows is 1"):
        teacher.run(rows, max_quarantined_rows=1)
    assert [len(times) for times in teacher.fired().values()] == [3, 4]

    stats = teacher.run({"q6:0": deadly}, max_quarantined_rows=1)
    assert [len(times) for times in teacher.fired().values()] == [3, 4]
    assert (stats.rows, stats.replaced_engines, stats.quarantined_rows) == (1, 0, 0)
    teacher.require_whole(without=["q6:0"])
    assert sealed.items() <= shard_hashes(teacher.store).items()
    (quarantined,) = StoreReader(teacher.store).quarantined
    assert quarantined.row_id == "q6:0"
    assert "died" in quarantined.reason


def test_engines_that_always_die_end_the_job(teacher: Teacher) -> None:
    """Where every batch kills its engine the job ends after three, says how, and does not try for ever."""
    rows = {f"q{index}:0": Fault(signal.SIGKILL, always=True) for index in range(NUM_PROMPTS)}
    with pytest.raises(ClusterError, match=r"3 teacher engines were lost before any row came back.*it died"):
        teacher.run(rows)
    assert len(StoreReader(teacher.store, require_complete=False)) == 0
