"""TRL's DistillationTrainer as a side of the online step benchmark. Runs in TRL's environment.

As a user would set it for speed on a CPU: fp32 without gradient checkpointing, the whole step's rows generated at once
with a key-value cache, fused AdamW. The trainer is on-policy by construction: each optimizer step generates with the
student as it is, and the loss is over the whole vocabulary of a local teacher.
`python3 -m benchmarks._online_trl SETTING REPORT`
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Timing(TrainerCallback):
    """Time from the end of one optimizer step to the end of the next, and of that what generation takes."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.ends.append(time.monotonic())
        self.cpu_ends.append(time.process_time())


class TimedTrainer(DistillationTrainer):
    """DistillationTrainer that counts response tokens and the time that it generates."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.tokens: list[int] = []
        self.generate_s: list[float] = []

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
        started = time.monotonic()
        completions = super()._generate_single_turn(*arguments, **options)
        self.generate_s.append(time.monotonic() - started)
        self.tokens.append(sum(len(ids) for ids in completions))
        return completions


def main() -> None:
    """Time the steps."""
    setting = json.loads(sys.argv[1])
    torch.set_num_threads(setting["threads"])
    folder, timing = Path(setting["folder"]), Timing()
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as output:
        trainer = TimedTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
            teacher_model=AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32),
            args=_arguments(setting, output),
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=AutoTokenizer.from_pretrained(folder / "student", padding_side="left"),
            callbacks=[timing],
        )
        trainer.train()
    report = {
        "ends": timing.ends,
        "cpu_ends": timing.cpu_ends,
        "tokens": trainer.tokens,
        "generate_s": trainer.generate_s,
        "peak_bytes": _peak_bytes(),
    }
    Path(sys.argv[2]).write_text(json.dumps(report), encoding="utf-8")


def _arguments(setting: dict[str, Any], output: str) -> DistillationConfig:
    return DistillationConfig(
        output_dir=output,
        beta=setting["beta"],
        max_completion_length=setting["response_tokens"],
        per_device_train_batch_size=setting["micro_rows"],
        gradient_accumulation_steps=setting["rows"] // setting["micro_rows"],
        max_steps=setting["steps"],
        learning_rate=setting["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=10**6,
        disable_tqdm=True,
    )


def _peak_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if "VmHWM" in line]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
