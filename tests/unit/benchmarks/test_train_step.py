import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from benchmarks import _models
from benchmarks._lengths import MAX_TOKENS, dolly_lengths
from benchmarks._options import objective_options
from benchmarks._step_dense import DenseStep, dense_loss, padded, top_p_mask
from benchmarks._step_ours import VARIANTS, OurStep, make_sets
from benchmarks._step_setting import Row, Setting, timed_steps
from openrlhf_bd.functional.bellman import bellman_loss_from_logits
from openrlhf_bd.functional.candidates import top_p_candidates
from openrlhf_bd.functional.trajectories import Trajectories
from openrlhf_bd.records import Rollout

VOCAB_SIZE = 11


def test_the_dense_reference_minimises_preset_paper() -> None:
    """The authors' way in the train step benchmark has the loss and gradient of preset `paper`, padding and all."""
    random = np.random.default_rng(0)
    rows = [
        Row(random.integers(0, VOCAB_SIZE, 3).astype(np.int32), random.integers(0, VOCAB_SIZE, length).astype(np.int32))
        for length in (5, 1, 8)
    ]
    ids_BT, attention_BT, response_BT = padded(rows)
    assert attention_BT.sum(dim=1).tolist() == [8, 4, 11]
    generator = torch.Generator().manual_seed(0)
    student_BTV = torch.randn(3, MAX_TOKENS, VOCAB_SIZE, generator=generator).mul_(3.0).requires_grad_()
    teacher_BTV = torch.randn(3, MAX_TOKENS, VOCAB_SIZE, generator=generator).mul_(2.0)
    # State t of a row with 3 prompt tokens is position 2 + t.
    states = [(row, 2 + t) for row in range(3) for t in range(len(rows[row].response_ids))]
    index = tuple(torch.tensor(part) for part in zip(*states, strict=True))
    expected = bellman_loss_from_logits(
        student_BTV[index],
        top_p_candidates(teacher_BTV[index], top_p=0.8),
        Trajectories.from_rollouts([Rollout("row", row.prompt_ids, row.response_ids, "stop") for row in rows]),
        objective_options("paper"),  # type: ignore[arg-type]
        num_tokens=1.0,
        num_rows=1.0,
    ).loss
    loss = dense_loss(student_BTV, top_p_mask(teacher_BTV, 0.8), ids_BT, response_BT)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student_BTV)
    (expected_gradient,) = torch.autograd.grad(expected, student_BTV)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)
    assert gradient.abs().max() > 1.0


def test_lengths_are_those_of_the_data_set() -> None:
    """Drawn lengths have the data set's means (prompt 70.7, response 69.1 tokens) within 3 %, and none is over 512."""
    prompt_N, response_N = dolly_lengths(1000, seed=0)
    assert prompt_N.mean() == pytest.approx(70.7, rel=0.03)
    assert response_N.mean() == pytest.approx(69.1, rel=0.03)
    assert (prompt_N + response_N).max() <= MAX_TOKENS
    assert response_N.min() >= 1


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    tiny = GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=512)
    monkeypatch.setitem(_models.SHAPES, "tiny", tiny)
    return Setting(
        student="tiny",
        teacher="tiny",
        device="cpu",
        rows=4,
        steps=2,
        warm_up_steps=1,
        micro_tokens=512,
        micro_rows=2,
        variant="sets",
        sets_folder=str(tmp_path),
        threads=None,
    )


def test_our_side_computes_no_padding_and_learns(setting: Setting) -> None:
    """Every variant of our side steps over the stored sets: positions are tokens, and weights change."""
    made = make_sets(setting)
    assert made.notes["mean set size, robust"] > made.notes["mean set size, paper"] >= 1
    for variant in VARIANTS:
        step = OurStep(replace(setting, variant=variant))
        before = step.student.model.get_output_embeddings().weight.detach().clone()
        report = timed_steps(replace(setting, variant=variant), step, step.flops)
        assert len(report.seconds) == 2
        assert report.positions == report.tokens
        assert report.tokens == made.tokens[1:]
        assert not torch.equal(step.student.model.get_output_embeddings().weight, before)


def test_the_dense_side_pads_every_row(setting: Setting) -> None:
    """The authors' way computes 512 positions a row, and tells the time of each of its parts."""
    step = DenseStep(setting)
    report = timed_steps(setting, step, step.flops)
    assert report.positions == [4 * MAX_TOKENS] * 2
    assert set(report.parts) == {"teacher", "mask", "student and loss", "optimizer"}


def test_our_side_needs_torch_and_transformers_alone() -> None:
    """Our side of the train step benchmark runs where neither Ray, DeepSpeed, vLLM, OpenRLHF nor pydantic is."""
    code = (
        "import sys, benchmarks._step_ours\n"
        "print(sorted({'ray', 'vllm', 'deepspeed', 'openrlhf', 'pydantic', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
