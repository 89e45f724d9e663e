"""An on-policy step, response tokens trained on a second: ours against TRL's DistillationTrainer.

Every step samples new responses from the student as it is, has the teacher judge them, and updates the student. Both
sides start from the same models, prompts and lengths, with AdamW, on the same cores of a CPU.

ours, on-policy    the whole job: Ray, vLLM engines of student and teacher, store, DeepSpeed ranks; max_staleness 0
ours, one behind   the same with max_staleness 1: rows of a step are made while the one before it trains
TRL                DistillationTrainer with transformers' generation and a local teacher, at several micro-batch sizes

Each side runs in turn, over and over; time is from the end of the last warm-up step to the end of the last timed one.

PYTHONPATH=. python3 benchmarks/online_step.py --trl-python .venv-trl/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks._measure import describe_machine
from benchmarks._models import TEACHER_LOGIT_STD
from benchmarks._online_job import (
    ROOT,
    SHAPES,
    STUDENT_LOGIT_STD,
    CpuClock,
    Job,
    job_flags,
    step_records,
    write_model,
    write_prompts,
)

LEARNING_RATE = 1e-5
# The last steps of a run are not timed: nobody makes rows for later ones meanwhile.
LAST_STEPS = 2


@dataclass(frozen=True)
class Figures:
    """One run of one side.

    Attributes:
        tokens: response tokens trained on in the timed steps.
        seconds: of the timed steps.
        cpu_seconds: of them, all processes of the side.
        steps: timed.
        note: where the time went.
    """

    tokens: float
    seconds: float
    cpu_seconds: float
    steps: int
    note: str


def run_ours(options: argparse.Namespace, folder: Path, *, max_staleness: int) -> Figures:
    """Run the job, and read its metrics."""
    output, clock = folder / "run", CpuClock()
    shutil.rmtree(output, ignore_errors=True)
    flags = job_flags(
        folder,
        output,
        algo__distill__name=options.algorithm,
        algo__distill__mode="online",
        algo__distill__rollout="student",
        algo__distill__max_staleness=max_staleness,
        # The ids that end a response are too many here to be in every set.
        algo__distill__include_eos=str(options.stop_share == 0).lower(),
        actor__num_gpus_per_node=len(options.cores),
        actor__adam__lr=LEARNING_RATE,
        teacher__num_engines=len(options.cores),
        vllm__num_engines=len(options.cores),
        rollout__max_new_tokens=options.response_tokens,
        data__max_len=options.prompt_tokens + options.response_tokens,
        train__batch_size=options.rows,
        train__max_tokens_per_gpu=options.micro_tokens,
        train__max_epochs=1000,
        train__max_steps=options.warm_up_steps + options.steps + LAST_STEPS,
    )
    Job(flags, log=folder / "job.log", cores=options.cores, on_poll=clock.look).run()
    records = step_records(output)
    timed = records[options.warm_up_steps : options.warm_up_steps + options.steps]
    first, last = records[options.warm_up_steps - 1]["time_s"], timed[-1]["time_s"]
    names = {
        "waits for rows": "time_rollout_wait_s",
        "forward, backward": "time_forward_backward_s",
        "optimizer": "time_optimizer_s",
        "weights to engines": "sync_s",
        "sealing": "time_seal_s",
    }
    means = {name: sum(record[key] for record in timed) / len(timed) for name, key in names.items()}
    used = clock.between(first, last)
    return Figures(
        tokens=sum(record["response_length"] for record in timed) * options.rows,
        seconds=last - first,
        cpu_seconds=sum(used.values()),
        steps=len(timed),
        note=f"{_milliseconds(means, 1)}; of processor time: {_milliseconds(used, len(timed))}",
    )


def _milliseconds(seconds: Mapping[str, float], steps: int) -> str:
    return ", ".join(f"{name} {value / steps * 1e3:.0f} ms" for name, value in seconds.items())


def run_trl(options: argparse.Namespace, folder: Path, *, micro_rows: int) -> Figures:
    """Run TRL's trainer in its own environment."""
    setting = {
        "folder": str(folder),
        "threads": len(options.cores),
        "beta": options.beta,
        "response_tokens": options.response_tokens,
        "rows": options.rows,
        "micro_rows": micro_rows,
        "steps": options.warm_up_steps + options.steps,
        "learning_rate": LEARNING_RATE,
    }
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(len(options.cores)),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    path = folder / "trl.json"
    command = [options.trl_python, "-m", "benchmarks._online_trl", json.dumps(setting), str(path)]
    with (folder / "trl.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        os.sched_setaffinity(process.pid, options.cores)
        if process.wait():
            log.seek(0)
            raise SystemExit(f"TRL failed (exit status {process.returncode}):\n{log.read()[-4000:]}")
    report = json.loads(path.read_text(encoding="utf-8"))
    ends, cpu_ends, first = report["ends"], report["cpu_ends"], options.warm_up_steps
    generate_s = sum(report["generate_s"][first:])
    seconds = ends[-1] - ends[first - 1]
    return Figures(
        tokens=sum(report["tokens"][first:]),
        seconds=seconds,
        cpu_seconds=cpu_ends[-1] - cpu_ends[first - 1],
        steps=options.steps,
        note=f"generation {generate_s / options.steps * 1e3:.0f} ms, "
        f"teacher, student, optimizer {(seconds - generate_s) / options.steps * 1e3:.0f} ms",
    )


def sides_of(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Figures]]:
    """What runs, by name."""
    sides: dict[str, Callable[[], Figures]] = {
        "ours, on-policy": lambda: run_ours(options, folder, max_staleness=0),
        "ours, one behind": lambda: run_ours(options, folder, max_staleness=1),
    }
    if options.trl_python:
        for rows in options.micro_rows:
            sides[f"TRL, {rows} x"] = lambda rows=rows: run_trl(options, folder, micro_rows=rows)  # type: ignore[misc]
    return sides


def print_table(figures: dict[str, list[Figures]], rows: int) -> None:
    """Medians over the repeats, and how many times as fast as TRL at its best each side is."""

    def speeds(name: str) -> tuple[float, float]:
        return (
            median(run.tokens / run.seconds for run in figures[name]),
            median(run.tokens / run.cpu_seconds for run in figures[name]),
        )

    trl = [speeds(name) for name in figures if name.startswith("TRL")]
    best = [max(speed[index] for speed in trl) if trl else float("nan") for index in range(2)]
    print(f"{'':18} ms/step  tokens/response  tokens/s   /TRL  tokens/s of processor time   /TRL")
    for name, runs in figures.items():
        wall, processor = speeds(name)
        step_ms = median(run.seconds / run.steps for run in runs) * 1e3
        length = sum(run.tokens for run in runs) / sum(run.steps for run in runs) / rows
        print(
            f"{name:18} {step_ms:7.0f} {length:16.1f} {wall:9.0f} {wall / best[0]:6.2f} {processor:27.0f} "
            f"{processor / best[1]:6.2f}"
        )
    print("tokens: response tokens trained on; /TRL: against TRL at its best micro-batch size")
    for name, runs in figures.items():
        print(f"  {name}, a step: {runs[-1].note}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, few steps: does it run, and roughly how")
    parser.add_argument("--trl-python", help="interpreter of TRL's environment, see benchmarks/trl_environment.sh")
    parser.add_argument("--algorithm", default="bd", help="our loss")
    parser.add_argument("--beta", type=float, default=1.0, help="TRL's loss: 0 forward KL, 1 (its default) reverse KL")
    parser.add_argument(
        "--num-cores", type=int, help="of both sides: TRL's threads; our ranks, and engines of each kind"
    )
    parser.add_argument("--shape", choices=SHAPES, help="student")
    parser.add_argument("--teacher-shape", choices=SHAPES, help="teacher")
    parser.add_argument("--vocabulary", type=int, help="ids")
    parser.add_argument("--rows", type=int, help="of an optimizer step")
    parser.add_argument("--prompt-tokens", type=int, help="of each row")
    parser.add_argument("--response-tokens", type=int, help="of each row")
    parser.add_argument(
        "--stop-share",
        type=float,
        default=0.0,
        help="chance that a token ends its response; 0: all have --response-tokens, else that is their limit",
    )
    parser.add_argument("--micro-rows", type=int, nargs="+", help="rows of TRL's micro-batches; all are tried")
    parser.add_argument("--micro-tokens", type=int, help="positions of our micro-batches")
    parser.add_argument("--warm-up-steps", type=int, help="of each run, before those that are timed")
    parser.add_argument("--steps", type=int, help="timed steps of each run")
    parser.add_argument("--repeats", type=int, help="how often each side runs")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    defaults = {
        "shape": "medium",
        "teacher_shape": "medium-twice",
        "vocabulary": 32_768,
        "rows": 16,
        "prompt_tokens": 32,
        "response_tokens": 64,
        "micro_rows": [4, 16],
        "micro_tokens": 2048,
        "warm_up_steps": 3,
        "steps": 12,
        "repeats": 3,
        "num_cores": 2,
    }
    quick = {"shape": "small", "teacher_shape": "small-twice", "vocabulary": 8192, "rows": 8, "response_tokens": 32}
    quick |= {"micro_rows": [8], "steps": 4, "warm_up_steps": 2, "repeats": 1, "num_cores": 1}
    for name, value in (defaults | (quick if options.quick else {})).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if any(options.rows % rows for rows in options.micro_rows):
        parser.error(f"--rows {options.rows} is not a multiple of each of --micro-rows {options.micro_rows}")
    if options.trl_python and shutil.which(options.trl_python) is None:
        parser.error(f"--trl-python {options.trl_python}: no such program; benchmarks/trl_environment.sh makes it")
    options.cores = sorted(os.sched_getaffinity(0))[-options.num_cores :]
    return options


def main() -> None:
    """Write models and prompts, run all sides in turn, print the table."""
    options = arguments()
    print(describe_machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for role, shape, std in (
            ("student", options.shape, STUDENT_LOGIT_STD),
            ("teacher", options.teacher_shape, TEACHER_LOGIT_STD),
        ):
            kind = {"vocab_size": options.vocabulary, "logit_std": std, "stop_share": options.stop_share}
            size = write_model(folder / role, shape, seed=len(role), **kind)
            print(f"{role}: {SHAPES[shape]}, vocabulary {options.vocabulary}: {size / 1e6:.0f} million parameters")
        write_prompts(folder / "prompts.jsonl", 512, num_tokens=options.prompt_tokens, seed=1)
        lengths = f"prompts of {options.prompt_tokens} and responses of up to {options.response_tokens} tokens"
        print(f"{options.rows} rows a step, {lengths}; {len(options.cores)} cores", flush=True)
        if not options.trl_python:
            print("TRL is left out: make its environment with benchmarks/trl_environment.sh, then add --trl-python")
        sides = sides_of(options, folder)
        figures: dict[str, list[Figures]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side, run in sides.items():
                figures[side].append(found := run())
                print(f"  {side}: {found.tokens / found.seconds:.0f} tokens/s", file=sys.stderr, flush=True)
    print_table(figures, options.rows)
    if options.json:
        values = {side: [asdict(run) for run in runs] for side, runs in figures.items()}
        options.json.write_text(json.dumps(values, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
