"""The published method as its authors' code computes it, as a side of the train step benchmark.

The teacher runs in the same process in every step; rows are padded to 512 tokens; the top-p mask, made by sorting the
vocabulary, and every quantity of the loss are dense tensors over [B, T, V]. The objective is that of preset `paper`,
in the plainest form that has these properties. `python3 -m benchmarks._step_dense SETTING REPORT`
"""

# B rows, T positions of a row, V vocabulary

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks._lengths import MAX_TOKENS
from benchmarks._measure import now
from benchmarks._models import decoder_flops, head_flops
from benchmarks._options import objective_options
from benchmarks._step_setting import (
    BETAS,
    LEARNING_RATE,
    MAX_NORM,
    Row,
    Setting,
    read_setting,
    timed_steps,
    write_report,
)

OPTIONS = objective_options("paper")


class DenseStep:
    """An optimizer step: micro-batches of padded rows, teacher and student forward, dense loss, clipping, AdamW."""

    def __init__(self, setting: Setting) -> None:
        self.device = setting.torch_device()
        self.micro_rows = setting.micro_rows
        self.student = setting.new_student()
        self.teacher = setting.new_teacher()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LEARNING_RATE, betas=BETAS, fused=True)

    def __call__(self, number: int, rows: list[Row]) -> tuple[int, dict[str, float]]:
        del number
        num_tokens = sum(len(row.response_ids) for row in rows)
        parts = {"teacher": 0.0, "mask": 0.0, "student and loss": 0.0, "optimizer": 0.0}
        clock = now(self.device)

        def lap(name: str) -> None:
            nonlocal clock
            before, clock = clock, now(self.device)
            parts[name] += clock - before

        positions = 0
        for start in range(0, len(rows), self.micro_rows):
            ids_BT, attention_BT, response_BT = (
                tensor.to(self.device) for tensor in padded(rows[start : start + self.micro_rows])
            )
            with torch.no_grad():
                teacher_BTV = self.teacher(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits
            lap("teacher")
            mask_BTV = top_p_mask(teacher_BTV, OPTIONS.top_p)
            del teacher_BTV
            lap("mask")
            student_BTV = self.student(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits
            (dense_loss(student_BTV, mask_BTV, ids_BT, response_BT) / num_tokens).backward()
            del student_BTV, mask_BTV
            lap("student and loss")
            positions += ids_BT.numel()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        lap("optimizer")
        return positions, parts

    def flops(self, rows: list[Row]) -> float:
        """The student forward and backward, the teacher forward; both heads at the states that count."""
        lengths, states = [row.num_tokens for row in rows], sum(len(row.response_ids) for row in rows)
        student = decoder_flops(self.student, lengths) + head_flops(self.student, states)
        return 3.0 * student + decoder_flops(self.teacher, lengths) + head_flops(self.teacher, states)


def padded(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and mask of the response tokens, [B, MAX_TOKENS], padded on the right."""
    ids_BT = np.zeros((len(rows), MAX_TOKENS), dtype=np.int64)
    attention_BT, response_BT = np.zeros_like(ids_BT), np.zeros_like(ids_BT)
    for index, row in enumerate(rows):
        ids_BT[index, : row.num_tokens] = np.concatenate([row.prompt_ids, row.response_ids])
        attention_BT[index, : row.num_tokens] = 1
        response_BT[index, len(row.prompt_ids) : row.num_tokens] = 1
    return torch.from_numpy(ids_BT), torch.from_numpy(attention_BT), torch.from_numpy(response_BT)


def top_p_mask(teacher_BTV: Tensor, top_p: float) -> Tensor:
    """True on the tokens of each position's top-p set (Def. 1, with the token that crosses p)."""
    sorted_BTV, order_BTV = torch.softmax(teacher_BTV.float(), dim=-1).sort(dim=-1, descending=True)
    keep_BTV = sorted_BTV.cumsum(dim=-1) - sorted_BTV < top_p
    keep_BTV[..., 0] = True
    return torch.zeros_like(keep_BTV).scatter_(-1, order_BTV, keep_BTV)


def dense_loss(student_BTV: Tensor, mask_BTV: Tensor, ids_BT: Tensor, response_BT: Tensor) -> Tensor:
    """Sum of the objective of preset `paper` over the response tokens of rows that all ended by a stop token.

    Args:
        student_BTV: the student's logits at every position. Gradient flows.
        mask_BTV: the teacher's top-p sets.
        ids_BT: tokens.
        response_BT: 1 on response tokens.
    """
    logits_BTV = student_BTV[:, :-1].float()
    mask_BTV, taken_BT, action_BT = mask_BTV[:, :-1], ids_BT[:, 1:], response_BT[:, 1:].bool()
    q_BTV = (logits_BTV - logits_BTV.amax(dim=-1, keepdim=True)).clamp(min=OPTIONS.q_min)
    value_BT = q_BTV.masked_fill(~mask_BTV, float("-inf")).logsumexp(dim=-1)
    q_taken_BT = q_BTV.gather(-1, taken_BT[..., None])[..., 0]
    counts_BT = action_BT & mask_BTV.gather(-1, taken_BT[..., None])[..., 0]
    # V = 0 after the stop token: where the next position has no action.
    next_value_BT = torch.cat([value_BT[:, 1:] * action_BT[:, 1:], value_BT.new_zeros(len(value_BT), 1)], dim=1)
    reward_BT = q_taken_BT - OPTIONS.gamma * next_value_BT
    loss_BT = value_BT - q_taken_BT + reward_BT.square() / (4 * OPTIONS.alpha)
    return loss_BT[counts_BT].sum()


def main() -> None:
    """Time the steps."""
    setting, path = read_setting()
    step = DenseStep(setting)
    write_report(timed_steps(setting, step, step.flops), path)


if __name__ == "__main__":
    main()
