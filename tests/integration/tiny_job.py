"""A main job of a few steps: the embedded corpus, its teacher, and a student of random weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from openrlhf_bd.demo.corpus import write_corpus
from openrlhf_bd.demo.models import TEACHER_FOLDER, init_student

JOB_TIMEOUT_S = 420.0


def write_inputs(folder: Path) -> None:
    """Corpus and student of the job."""
    write_corpus(folder / "corpus", num_train=24, num_validation=6, num_test=6, seed=3)
    init_student(folder / "student", 3)


def job_flags(folder: Path, output_dir: Path, **changes: str) -> list[str]:
    """Flags of the main job; `changes` replace or add some, with __ for the dots of a flag's name."""
    corpus = folder / "corpus"
    flags = {
        "algo.distill.name": "bd",
        "algo.distill.preset": "robust",
        "teacher.model_name_or_path": str(TEACHER_FOLDER),
        "actor.model_name_or_path": str(folder / "student"),
        "actor.num_gpus_per_node": "2",
        "actor.adam.lr": "1e-3",
        "rollout.n_samples_per_prompt": "2",
        "rollout.max_new_tokens": "32",
        "data.prompt_dataset": str(corpus / "train.jsonl"),
        "data.input_key": "instruction",
        "data.context_key": "input",
        "data.label_key": "output",
        "data.prompt_wrapper": "paper",
        "data.max_len": "160",
        "data.pretrain_dataset": str(corpus / "pretrain.jsonl"),
        "train.batch_size": "12",
        "train.pretrain_batch_size": "2",
        "train.dynamic_batch_enable": "true",
        "train.max_tokens_per_gpu": "1024",
        "train.max_steps": "4",
        "ds.param_dtype": "fp32",
        "eval.dataset": str(corpus / "validation.jsonl"),
        "eval.steps": "2",
        "eval.seeds": "10 20",
        "eval.max_new_tokens": "32",
        "eval.checker": "openrlhf_bd.demo.corpus:is_correct",
        "eval.test_datasets": f"test={corpus / 'test.jsonl'}",
        "ckpt.output_dir": str(output_dir),
    }
    flags |= {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in flags.items() if value for word in (f"--{name}", *value.split(" "))]


def job_environment() -> dict[str, str]:
    """Of a job's process: this one's, without what would lead it to another Ray session."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    return environment | {"OMP_NUM_THREADS": "1"}


def run_job(
    *arguments: str,
    module: str = "openrlhf_bd.cli.train_bd_ray",
    environment: dict[str, str] | None = None,
    timeout_s: float = JOB_TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """The real command line in a process of its own. Its output, stderr included, is in `stdout`.

    Args:
        arguments: of the command.
        module: run by `python -m`.
        environment: of the process; None: that of `job_environment`.
        timeout_s: longest run.
    """
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=job_environment() if environment is None else environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
