"""TRL's GKDTrainer as a side of the train step benchmark: offline rows, a live teacher. Runs in TRL's environment.

As a user would set it for speed: no generation (lmbda 0), forward KL (beta 0, which needs fewer passes over the
logits than the default mixture), no gradient checkpointing, fused AdamW. Its collator gets `messages`; a tokenizer
whose words are ids and a chat template without markup make of them exactly the rows of the other sides.
`python3 -m benchmarks._step_trl SETTING REPORT`
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from benchmarks._lengths import MAX_TOKENS
from benchmarks._measure import memory_bytes, now, peak_memory_bytes, reset_peak_memory
from benchmarks._models import decoder_flops, head_flops
from benchmarks._step_setting import (
    BETAS,
    LEARNING_RATE,
    MAX_NORM,
    Report,
    Row,
    Setting,
    read_setting,
    rows_of_step,
    write_report,
)

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


class OfflineTrainer(GKDTrainer):
    """GKDTrainer that fails rather than generate."""

    @staticmethod
    def generate_on_policy_outputs(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("the trainer generated, though lmbda is 0")


class Timing(TrainerCallback):
    """Time from the end of one optimizer step to the end of the next: rows, gradients, clipping, optimizer."""

    def __init__(self, setting: Setting, report: Report) -> None:
        self.setting, self.report = setting, report
        self.device = setting.torch_device()
        self.last = self.last_cpu = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        clock, cpu_clock = now(self.device), time.process_time()
        if state.global_step > self.setting.warm_up_steps:
            self.report.seconds.append(clock - self.last)
            self.report.cpu_seconds.append(cpu_clock - self.last_cpu)
        elif state.global_step == self.setting.warm_up_steps:
            reset_peak_memory(self.device)
        self.last, self.last_cpu = clock, cpu_clock


class CountingCollator:
    """The trainer's own collator, with a count of positions and a check that its rows are those of the other sides."""

    def __init__(self, collator: Any, rows: list[Row]) -> None:
        self.collator, self.rows = collator, rows
        self.positions: list[int] = []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(examples)
        self.positions.append(batch["input_ids"].numel())
        for example, ids_T, mask_T, labels_T in zip(
            examples, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            row = self.rows[example["row"]]
            if not np.array_equal(ids_T[mask_T.bool()].numpy(), np.concatenate([row.prompt_ids, row.response_ids])):
                raise RuntimeError(f"row {example['row']}: the collator made other tokens of it")
            if not np.array_equal(labels_T[labels_T != -100].numpy(), row.response_ids):
                raise RuntimeError(f"row {example['row']}: the collator took other tokens for the response")
        return batch


def _word(token_id: int) -> str:
    return f"<{token_id}>"


def id_tokenizer(vocab_size: int, stop_id: int) -> PreTrainedTokenizerFast:
    """Tokenizer whose words are their ids in brackets: the brackets keep special tokens from matching inside words."""
    words = models.WordLevel({_word(number): number for number in range(vocab_size)}, unk_token=_word(0))
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_word(stop_id),
        pad_token=_word(0),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
    )


def main() -> None:
    """Time the steps."""
    setting, path = read_setting()
    device = setting.torch_device()
    student = setting.new_student()
    teacher = setting.new_teacher()
    steps = [rows_of_step(setting, number) for number in range(setting.num_steps)]
    rows = [row for step in steps for row in step]
    report = Report(weights_bytes=memory_bytes(device))
    with tempfile.TemporaryDirectory() as folder:
        trainer = OfflineTrainer(
            model=student,
            teacher_model=teacher,
            args=_arguments(setting, folder),
            train_dataset=Dataset.from_list([_example(index, row) for index, row in enumerate(rows)]),
            processing_class=id_tokenizer(setting.vocab_size, setting.stop_id),
            callbacks=[Timing(setting, report)],
        )
        trainer.data_collator = collator = CountingCollator(trainer.data_collator, rows)
        trainer.train()
    report.peak_bytes = peak_memory_bytes(device)
    per_step = setting.rows // setting.micro_rows
    for number in range(setting.warm_up_steps, setting.num_steps):
        lengths, states = [row.num_tokens for row in steps[number]], sum(len(row.response_ids) for row in steps[number])
        report.tokens.append(sum(lengths))
        report.positions.append(sum(collator.positions[number * per_step : (number + 1) * per_step]))
        student_flops = decoder_flops(student, lengths) + head_flops(student, states)
        report.flops.append(3.0 * student_flops + decoder_flops(teacher, lengths) + head_flops(teacher, states))
    write_report(report, path)


def _arguments(setting: Setting, folder: str) -> GKDConfig:
    on_cuda = setting.device == "cuda"
    return GKDConfig(
        output_dir=folder,
        lmbda=0.0,
        beta=0.0,
        max_length=MAX_TOKENS,
        per_device_train_batch_size=setting.micro_rows,
        gradient_accumulation_steps=setting.rows // setting.micro_rows,
        max_steps=setting.num_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=MAX_NORM,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        bf16=on_cuda,
        use_cpu=not on_cuda,
        save_strategy="no",
        report_to="none",
        logging_steps=10**6,
        disable_tqdm=True,
    )


def _example(index: int, row: Row) -> dict[str, Any]:
    prompt, response = (" ".join(map(_word, ids.tolist())) for ids in (row.prompt_ids, row.response_ids))
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return {"row": index, "messages": messages}


if __name__ == "__main__":
    main()
