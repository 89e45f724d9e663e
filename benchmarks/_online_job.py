"""Jobs of the online benchmarks: models and prompts on disk, the real command line, and what its metrics say.

Both models have random weights and the tokenizer of the demo, in which a digit is a token: prompts are random digits.
Where one token of tens of thousands ends a response, nearly all have the length that is asked for; where more do,
lengths vary as those of real responses do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config
from transformers.utils.logging import disable_progress_bar

from benchmarks._models import INITIAL_STD, final_norm, hidden_size, num_parameters
from openrlhf_bd.demo.models import TEACHER_FOLDER

ROOT = Path(__file__).resolve().parent.parent
STUDENT_LOGIT_STD = 3.0
HEAD_SIZE = 64
POLL_S = 0.2

# Titles that Ray gives the processes of its actors, and what they are here.
ROLES = {"StudentRank": "ranks", "StudentSampler": "student engines", "TeacherEngine": "teacher engines"}


@dataclass(frozen=True)
class Shape:
    """A small model of the Qwen2 family."""

    hidden: int
    layers: int
    feed_forward: int


SHAPES = {
    "tiny": Shape(64, 2, 128),
    "small": Shape(256, 4, 704),
    "small-twice": Shape(384, 6, 1024),
    "medium": Shape(384, 6, 1024),
    "medium-twice": Shape(512, 8, 1536),
}


def write_model(
    folder: Path, shape: str, *, vocab_size: int, logit_std: float, seed: int, stop_share: float = 0.0
) -> int:
    """A model with random weights and its tokenizer; the number of its parameters.

    Args:
        folder: to write to.
        shape: a name of SHAPES.
        vocab_size: ids.
        logit_std: standard deviation of its logits; random weights as they are would be near to uniform.
        seed: of the weights.
        stop_share: share of the ids that end a response, beside the tokenizer's own: about the chance at each token.
    """
    size, tokenizer = SHAPES[shape], AutoTokenizer.from_pretrained(TEACHER_FOLDER)
    config = Qwen2Config(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // HEAD_SIZE,
        num_key_value_heads=max(1, size.hidden // HEAD_SIZE // 3),
        intermediate_size=size.feed_forward,
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        final_norm(model).weight.fill_(logit_std / (INITIAL_STD * hidden_size(model) ** 0.5))
    first_stop = vocab_size - round(stop_share * vocab_size)
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, *range(first_stop, vocab_size)])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return num_parameters(model)


def write_prompts(path: Path, num_prompts: int, *, num_tokens: int, seed: int) -> None:
    """Prompts of random digits, JSON lines with the text under "prompt"."""
    digits_NP = np.random.default_rng(seed).integers(10, size=(num_prompts, num_tokens))
    lines = (json.dumps({"prompt": "".join(map(str, digits_P))}) for digits_P in digits_NP.tolist())
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def job_flags(folder: Path, output: Path, **changes: Any) -> list[str]:
    """Flags of a job over the models and prompts of a folder; `changes` replace or add, with __ for dots."""
    flags = {
        "actor.model_name_or_path": folder / "student",
        "teacher.model_name_or_path": folder / "teacher",
        "data.prompt_dataset": folder / "prompts.jsonl",
        "data.input_key": "prompt",
        "actor.num_gpus_per_node": 1,
        "actor.adam.lr": 1e-5,
        "actor.lr_scheduler": "constant",
        "ds.param_dtype": "fp32",
        "ds.zero_stage": 0,
        "ds.packing_samples": "true",
        "train.dynamic_batch_enable": "true",
        "ckpt.output_dir": output,
    } | {name.replace("__", "."): value for name, value in changes.items()}
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


class Job:
    """A command in a process of its own, with all its actors watched from outside.

    Args:
        arguments: of the command.
        module: of the command; the main job's real command line if not given.
        cores: of all its processes, or of each role of ROLES and of "others"; None: all of the machine's.
        log: file of its output.
        on_poll: called with the processes by role from time to time.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        module: str = "openrlhf_bd.cli.train_bd_ray",
        log: Path,
        cores: Mapping[str, Sequence[int]] | Sequence[int] | None = None,
        on_poll: Callable[[dict[str, list[psutil.Process]]], None] | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._log, self._cores, self._on_poll = log, cores, on_poll

    def run(self) -> None:
        """Until it ends.

        Raises:
            SystemExit: it failed; the end of its output says why.
        """
        names = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = names | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        # Ray's workers give way to everything else on a machine; what they are compared with does not.
        environment["RAY_worker_niceness"] = "0"
        with self._log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                self._command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
            if isinstance(self._cores, Sequence):
                os.sched_setaffinity(process.pid, self._cores)  # whose children inherit it
            watcher = threading.Thread(target=self._watch, args=(process,), daemon=True)
            watcher.start()
            try:
                status = process.wait()
            finally:
                process.kill()
            watcher.join()
        if status:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise SystemExit(f"the job failed (exit status {status}):\n{tail}")

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            found = processes_by_role(process.pid)
            if isinstance(self._cores, Mapping):
                for role, members in found.items():
                    for member in members:
                        pin(member, self._cores[role])
            if self._on_poll is not None:
                self._on_poll(found)
            time.sleep(POLL_S)


class CpuClock:
    """Processor time of a job's processes, looked at from time to time; those that have ended count as last seen."""

    def __init__(self) -> None:
        self._of: dict[str, dict[int, float]] = {}
        self._looks: list[tuple[float, dict[str, float]]] = []

    def look(self, found: Mapping[str, Sequence[psutil.Process]]) -> None:
        """Read the clock."""
        for role, members in found.items():
            of_role = self._of.setdefault(role, {})
            for process in members:
                try:
                    times = process.cpu_times()
                except psutil.Error:
                    continue
                of_role[process.pid] = times.user + times.system
        self._looks.append((time.time(), {role: sum(times.values()) for role, times in self._of.items()}))

    def between(self, start_s: float, end_s: float) -> dict[str, float]:
        """Seconds of processor time by role between two times of the wall clock."""
        times = [look_s for look_s, _ in self._looks]
        return {
            role: float(np.diff(np.interp([start_s, end_s], times, [used[role] for _, used in self._looks]))[0])
            for role in self._of
        }


def processes_by_role(pid: int) -> dict[str, list[psutil.Process]]:
    """A job's processes: its actors by role, the driver and Ray's own as "others"."""
    roles: dict[str, list[psutil.Process]] = {role: [] for role in [*ROLES.values(), "others"]}
    try:
        members = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return roles
    for member in members:
        try:
            title = " ".join(member.cmdline())
        except psutil.Error:
            continue
        role = next((role for name, role in ROLES.items() if title.startswith(f"ray::{name}")), "others")
        roles[role].append(member)
    return roles


def pin(process: psutil.Process, cores: Sequence[int]) -> None:
    """Keep a process with all its threads on some cores."""
    for thread in Path(f"/proc/{process.pid}/task").glob("*"):
        try:
            if os.sched_getaffinity(int(thread.name)) != set(cores):
                os.sched_setaffinity(int(thread.name), cores)
        except (ProcessLookupError, FileNotFoundError):
            continue


def step_records(output: Path) -> list[dict[str, float]]:
    """Training records of a run, in order of their steps, without the "train/" of their names."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "train/loss" in record]
    return [{name.removeprefix("train/"): value for name, value in record.items()} for record in records]


def step_seconds(records: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
    """Wall-clock time from each step's end to the next one's; one fewer than records."""
    return np.diff([record["time_s"] for record in records])
