"""Our side of the train step benchmark: packed rows, stored candidate sets, no teacher. Torch and transformers alone.

`python3 -m benchmarks._step_ours SETTING REPORT`; the variant "sets" makes the sets, the others are VARIANTS.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._measure import memory_bytes, now, peak_memory_bytes, reset_peak_memory
from benchmarks._models import decoder_flops, head_flops
from benchmarks._options import objective_options
from benchmarks._step_setting import (
    BETAS,
    LEARNING_RATE,
    MAX_NORM,
    Report,
    Row,
    Setting,
    read_setting,
    rows_of_step,
    timed_steps,
    write_report,
)
from openrlhf_bd.data.assignment import MicroBatchLimit, assign
from openrlhf_bd.data.micro_batches import MicroBatch, collate
from openrlhf_bd.functional.bellman import bellman_loss
from openrlhf_bd.functional.candidates import CandidateSets, top_p_candidates
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.records import RecordedSets, Rollout
from openrlhf_bd.student.attention import PER_ROW_SDPA
from openrlhf_bd.student.model import StudentModel

# Options of each variant, and the preset whose sets it reads.
VARIANTS: dict[str, tuple[SimpleNamespace, str]] = {
    "robust": (objective_options("robust"), "robust"),
    "robust-sampled": (objective_options("robust", tail_estimator="sampled"), "robust"),
    "paper": (objective_options("paper"), "paper"),
}
STATES_PER_CHUNK = 256  # whose teacher logits are held at once while sets are made


class OurStep:
    """An optimizer step: micro-batches of packed rows, gradients, clipping, AdamW."""

    def __init__(self, setting: Setting) -> None:
        self.device = setting.torch_device()
        self.options, preset = VARIANTS[setting.variant]
        self.sets = read_sets(setting, preset)
        self.limit = MicroBatchLimit(rows=None, tokens=setting.micro_tokens, layout="packed")
        self.student = StudentModel(setting.new_student(attention=PER_ROW_SDPA))
        self.generator = torch.Generator(self.device).manual_seed(setting.seed)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LEARNING_RATE, betas=BETAS, fused=True)
        self.shift_constant = math.log(setting.vocab_size)

    def __call__(self, number: int, rows: list[Row]) -> tuple[int, dict[str, float]]:
        start = now(self.device)
        rollouts = [
            Rollout(str(index), row.prompt_ids, row.response_ids, "stop", None, sets)
            for index, (row, sets) in enumerate(zip(rows, self.sets[number], strict=True))
        ]
        num_tokens = sum(len(row.response_ids) for row in rows)
        positions = 0
        for part in assign(np.array([row.num_tokens for row in rows]), num_ranks=1, limit=self.limit)[0]:
            batch = collate([rollouts[item] for item in part.items], layout="packed", with_sets=True).to(self.device)
            self._loss(batch, num_tokens, len(rows)).backward()
            positions += batch.tokens.num_positions
        gradients_done = now(self.device)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return positions, {"gradients": gradients_done - start, "optimizer": now(self.device) - gradients_done}

    def _loss(self, batch: MicroBatch, num_tokens: int, num_rows: int) -> Tensor:
        def loss(head: StudentHead) -> Tensor:
            assert batch.sets is not None
            options: Any = self.options
            return bellman_loss(
                head,
                batch.sets,
                batch.trajectories,
                options,
                num_tokens=num_tokens,
                num_rows=num_rows,
                shift_constant=self.shift_constant,
                generator=self.generator,
                full_diagnostics=False,  # a run has them at every tenth step
            ).loss

        tokens = batch.tokens
        result: Tensor = self.student(
            tokens.input_ids, tokens.position_ids, tokens.attention_mask, tokens.state_index_S, loss
        )
        return result

    def flops(self, rows: list[Row]) -> float:
        """Forward and backward pass of the decoder, and the products over the vocabulary that the loss makes."""
        model = self.student.model
        if self.options.tail_coef == 0:
            products = 1.0  # the maximum, forward alone
        elif self.options.tail_estimator == "sampled":
            products = 3.0 * self.options.tail_samples / model.config.vocab_size
        else:
            products = 3.0
        head = products * head_flops(model, sum(len(row.response_ids) for row in rows))
        return 3.0 * decoder_flops(model, [row.num_tokens for row in rows]) + head


def make_sets(setting: Setting) -> Report:
    """Candidate sets of all rows of the benchmark, in one teacher pass over each, and what a token of it takes."""
    device = setting.torch_device()
    teacher = setting.new_teacher()
    report = Report(weights_bytes=memory_bytes(device))
    reset_peak_memory(device)
    made: dict[str, list[RecordedSets]] = {"robust": [], "paper": []}
    for number in range(setting.num_steps):
        rows = rows_of_step(setting, number)
        start, cpu_start = now(device), time.process_time()
        robust = [_sets_of(teacher, row, objective_options("robust"), setting) for row in rows]
        report.seconds.append(now(device) - start)
        report.cpu_seconds.append(time.process_time() - cpu_start)
        report.tokens.append(sum(row.num_tokens for row in rows))
        made["robust"] += robust
        made["paper"] += [_sets_of(teacher, row, objective_options("paper"), setting) for row in rows]
    report.peak_bytes = peak_memory_bytes(device)
    for preset, sets in made.items():
        _write_sets(setting, preset, sets)
        sizes = np.concatenate([row.sizes_S for row in sets])
        report.notes[f"mean set size, {preset}"] = float(sizes.mean())
    return report


@torch.no_grad()
def _sets_of(teacher: Any, row: Row, options: SimpleNamespace, setting: Setting) -> RecordedSets:
    device = teacher.device
    ids_L = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64)).to(device)
    states = slice(len(row.prompt_ids) - 1, row.num_tokens - 1)
    hidden_SH = teacher.base_model(input_ids=ids_L[None], use_cache=False).last_hidden_state[0, states]
    always = [setting.stop_id] if options.include_eos else []
    parts = [
        top_p_candidates(teacher.lm_head(hidden_CH), top_p=options.top_p, always_include=always)
        for hidden_CH in hidden_SH.split(STATES_PER_CHUNK)
    ]
    return _recorded(parts)


def _recorded(parts: list[CandidateSets]) -> RecordedSets:
    sizes = torch.cat([part.sizes_S for part in parts]).cpu().numpy()
    logprobs = [part.logprobs_M for part in parts if part.logprobs_M is not None]
    return RecordedSets(
        ids_M=torch.cat([part.ids_M for part in parts]).cpu().numpy().astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        neg_log_mass_S=torch.cat([part.neg_log_mass_S for part in parts]).cpu().numpy(),
        logprobs_M=torch.cat(logprobs).cpu().numpy(),
    )


def _write_sets(setting: Setting, preset: str, sets: list[RecordedSets]) -> None:
    arrays = {}
    for index, row in enumerate(sets):
        assert row.logprobs_M is not None
        values = (row.ids_M, row.offsets, row.neg_log_mass_S, row.logprobs_M)
        arrays |= {f"{index}.{place}": array for place, array in enumerate(values)}
    np.savez(Path(setting.sets_folder) / f"{preset}.npz", **arrays)


def read_sets(setting: Setting, preset: str) -> list[list[RecordedSets]]:
    """Sets of the rows of each step, as make_sets wrote them."""
    with np.load(Path(setting.sets_folder) / f"{preset}.npz") as arrays:
        rows = [
            RecordedSets(*(arrays[f"{index}.{place}"] for place in range(4)))
            for index in range(setting.num_steps * setting.rows)
        ]
    return [rows[start : start + setting.rows] for start in range(0, len(rows), setting.rows)]


def main() -> None:
    """Make the sets, or time the steps of a variant."""
    setting, path = read_setting()
    if setting.variant == "sets":
        write_report(make_sets(setting), path)
        return
    step = OurStep(setting)
    write_report(timed_steps(setting, step, step.flops), path)


if __name__ == "__main__":
    main()
