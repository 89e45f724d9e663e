"""Teacher and student side by side: real tiny models of every family, beside their own logits in float64."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from openrlhf_bd.config import Config
from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.evaluation.exposure import ResponseRow, exposure_of
from openrlhf_bd.evaluation.exposure_models import ExposureModels, check_exposed, compare
from openrlhf_bd.student.attention import PER_ROW_SDPA
from openrlhf_bd.student.live_teacher import LiveTeacher
from openrlhf_bd.student.model import StudentModel
from tests.unit.student.families import FAMILIES, VOCAB

CPU = torch.device("cpu")
IDS = VOCAB - 5  # the models' embeddings are padded


def model_of(family: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        deepcopy(FAMILIES[family]), dtype=torch.float64, attn_implementation=PER_ROW_SDPA
    ).eval()
    model.get_output_embeddings().weight.data *= 20  # distributions with peaks
    return model


def rows_of(seed: int) -> list[ResponseRow]:
    """Four responses; the teacher sees a longer prompt than the student in the second."""
    random = np.random.default_rng(seed)
    lengths = [(3, 3, 4), (2, 6, 1), (5, 5, 7), (1, 1, 3)]
    return [
        ResponseRow(*(random.integers(2, IDS, size).astype(np.int32) for size in (own, other, response)))
        if own != other
        else ResponseRow(ids := random.integers(2, IDS, own).astype(np.int32), ids, random.integers(2, IDS, response))
        for own, other, response in lengths
    ]


def log_probs(model: PreTrainedModel, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> torch.Tensor:
    """[T, IDS], of one row by itself."""
    ids = torch.tensor([[*prompt_ids, *response_ids]]).long()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1, :IDS]
    return torch.log_softmax(logits, dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_what_each_row_gives(family: str):
    """Measures of packed rows are those of each row by itself, the teacher's prompt its own, padded ids left out."""
    student, teacher = model_of(family, 1), model_of(family, 2)
    rows = rows_of(3)
    expected = [
        (
            log_probs(student, row.prompt_ids, row.response_ids),
            log_probs(teacher, row.teacher_prompt_ids, row.response_ids),
        )
        for row in rows
    ]
    heads = [LiveTeacher(StudentModel(model), IDS) for model in (student, teacher)]
    found = compare(*heads, rows, top_p=0.5, device=CPU)
    for row, measures, (log_q, log_p) in zip(rows, found, expected, strict=True):
        np.testing.assert_allclose(measures.forward_kl_T, (log_p.exp() * (log_p - log_q)).sum(-1), atol=1e-9)
        np.testing.assert_allclose(measures.reverse_kl_T, (log_q.exp() * (log_q - log_p)).sum(-1), atol=1e-9)
        taken = log_p.gather(1, torch.from_numpy(row.response_ids).long()[:, None])
        np.testing.assert_allclose(measures.teacher_nll_T, -taken[:, 0], atol=1e-9)
        before = torch.where(log_p > taken, log_p.exp(), 0.0).sum(-1)
        assert measures.outside_T.tolist() == (before >= 0.5).tolist()


def test_a_student_that_is_its_teacher_has_no_exposure():
    """Where the student is the teacher, every divergence is 0, and no error accumulates, whoever sampled."""
    heads = [LiveTeacher(StudentModel(model_of("qwen2", 1)), IDS) for _ in range(2)]
    same = [[replace(row, teacher_prompt_ids=row.prompt_ids) for row in rows_of(seed)] for seed in (4, 5)]
    own, other = ([compare(*heads, rows, top_p=0.8, device=CPU)] * 2 for rows in same)
    exposure = exposure_of(own, other, top_p=0.8)
    assert max(*exposure.forward_kl, *exposure.reverse_kl) < 1e-12
    assert exposure.excess_error_T == [0.0] * 7
    assert exposure.positions == [1, 2, 3, 4, 5, 6, 7]
    assert exposure.reach_student_T == [1.0, 0.75, 0.75, 0.5, 0.25, 0.25, 0.25]


def test_models_are_loaded_and_rows_come_in_any_number(monkeypatch: pytest.MonkeyPatch):
    """The shipped teacher beside itself: rows that need several forward passes give what one gives, in their order."""
    config = Config.model_validate({"teacher": {"model_name_or_path": str(TEACHER_FOLDER)}})
    models = ExposureModels(config)
    models.load(str(TEACHER_FOLDER))
    random = np.random.default_rng(0)
    ids = [random.integers(1, 100, length).astype(np.int32) for length in (4, 6, 3, 9)]
    rows = [ResponseRow(ids[0], ids[0], response) for response in ids]
    whole = models.measure(rows)
    monkeypatch.setattr("openrlhf_bd.evaluation.exposure_models.MICRO_BATCH_TOKENS", 11)
    parts = models.measure(rows)
    assert [len(row.teacher_nll_T) for row in whole] == [4, 6, 3, 9]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.teacher_nll_T, other.teacher_nll_T, rtol=1e-4)
        assert max(one.forward_kl_T.max(), one.reverse_kl_T.max()) < 1e-5


def test_distributions_are_over_the_ids_that_both_models_have(tmp_path: Path):
    """Sampled ids that no tokenizer knows are ids like others; the teacher has all of its own for the next student."""
    sizes, paths, logits = {"teacher": VOCAB + 4, "small": VOCAB - 3, "large": VOCAB + 9}, {}, {}
    ids = np.array([5, 3, VOCAB - 4, 8], np.int32)
    for seed, (name, size) in enumerate(sizes.items()):
        model = model_of("qwen2", seed).float()
        model.resize_token_embeddings(size, mean_resizing=False)
        paths[name] = str(tmp_path / name)
        model.save_pretrained(paths[name])
        with torch.no_grad():
            logits[name] = model(input_ids=torch.from_numpy(ids).long()[None]).logits[0, :-1].double()
    models = ExposureModels(Config.model_validate({"teacher": {"model_name_or_path": paths["teacher"]}}))
    for name, num_ids in (("small", VOCAB - 3), ("large", VOCAB + 4), ("small", VOCAB - 3)):
        models.load(paths[name])
        (found,) = models.measure([ResponseRow(ids[:1], ids[:1], ids[1:])])
        log_p, log_q = (torch.log_softmax(logits[which][:, :num_ids], dim=1) for which in ("teacher", name))
        taken = log_p.gather(1, torch.from_numpy(ids[1:]).long()[:, None])[:, 0]
        np.testing.assert_allclose(found.teacher_nll_T, -taken, rtol=1e-4)
        np.testing.assert_allclose(found.forward_kl_T, (log_p.exp() * (log_p - log_q)).sum(1), rtol=1e-3)
        np.testing.assert_allclose(found.reverse_kl_T, (log_q.exp() * (log_q - log_p)).sum(1), rtol=1e-3)


def test_a_family_whose_logits_are_more_than_its_head():
    """A family that is not supported is refused with those that are, and with what to do instead."""
    with pytest.raises(ConfigError, match=r"--eval\.exposure: m is of type gemma2; expected one of gpt2,.*teacher_nll"):
        check_exposed("m", "gemma2")
