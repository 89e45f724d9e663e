"""Several models evaluated by the real command line: nuclei, responses, exposure, controls, what a failure leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from tiny_job import run_job, write_inputs

from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.evaluation.results import Evaluation, read_responses

pytestmark = pytest.mark.integration

SEEDS, NUM_TESTS = [10, 20], 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus and student; a second test set that lacks one reference; a model whose weights have other shapes."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    lines = (folder / "corpus" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[:4]]
    questions = [{"question": r["instruction"], "answers": [r["output"], "none"]} for r in records]
    del questions[2]["answers"]
    text = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    broken = folder / "broken"
    shutil.copytree(folder / "student", broken)
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}), encoding="utf-8")
    return folder


def evaluate(inputs: Path, models: str) -> CompletedProcess[str]:
    corpus = inputs / "corpus" / "test.jsonl"
    flags = {
        "models": models,
        "teacher.model_name_or_path": str(TEACHER_FOLDER),
        "data.input_key": "instruction",
        "data.context_key": "input",
        "data.label_key": "output",
        "data.prompt_wrapper": "paper",
        "data.max_len": "160",
        "eval.test_datasets": f"test={corpus},"
        f"asked={inputs / 'questions.jsonl'}:input_key=question:context_key=none:label_key=answers",
        "eval.seeds": " ".join(str(seed) for seed in SEEDS),
        "eval.max_new_tokens": "24",
        "eval.missing_references": "skip",
        "eval.exposure": "true",
        "ckpt.output_dir": str(inputs / "evaluation"),
    }
    arguments = [word for name, value in flags.items() for word in (f"--{name}", *value.split(" "))]
    return run_job(*arguments, module="openrlhf_bd.cli.evaluate")


@pytest.fixture(scope="module")
def folder(inputs: Path) -> Path:
    """The evaluation of teacher, student and sharpened student, after a first try that ended at a broken model."""
    student = inputs / "student"
    failed = evaluate(inputs, f"Teacher={TEACHER_FOLDER},Broken={inputs / 'broken'},Student={student}")
    assert failed.returncode == 2, failed.stdout
    assert "broken: cannot be loaded (RuntimeError" in failed.stdout
    assert (inputs / "evaluation" / "Teacher.json").exists(), failed.stdout
    done = evaluate(inputs, f"Teacher={TEACHER_FOLDER},Student={student},Cold={student}@temperature=0.5")
    assert done.returncode == 0, done.stdout
    # What the first try had finished was kept.
    assert "reused evaluation of Teacher" in done.stdout
    assert "reused evaluation of Student" not in done.stdout
    return inputs / "evaluation"


def test_every_model_has_its_files(folder: Path):
    """Each model has an evaluation and its responses, of both test sets under both nuclei; the broken one has none."""
    names = {path.name for path in folder.iterdir() if path.suffix in (".json", ".jsonl")} - {"run.json"}
    assert names == {
        f"{label}{end}" for label in ("Teacher", "Student", "Cold") for end in (".json", ".responses.jsonl")
    }
    for label, temperature in (("Teacher", 1.0), ("Student", 1.0), ("Cold", 0.5)):
        found = Evaluation.read(folder / f"{label}.json")
        assert list(found.datasets) == ["test", "asked", "test, top-p 0.8", "asked, top-p 0.8"]
        assert [scores.test_set for scores in found.datasets.values()] == ["test", "asked"] * 2
        assert [scores.top_p for scores in found.datasets.values()] == [1.0, 1.0, 0.8, 0.8]
        assert {scores.temperature for scores in found.datasets.values()} == {temperature}
        assert [scores.num_unscored for scores in found.datasets.values()] == [0, 1, 0, 1]
        assert all(scores.rouge_l is not None for scores in found.datasets.values())


def test_every_response_is_saved(folder: Path):
    """Each prompt, seed and nucleus has one response; their Rouge-L makes up the score, where there are references."""
    responses = read_responses(folder / "Student.json")
    assert len(responses) == len(SEEDS) * 2 * (NUM_TESTS + 4)
    keys = {(r.test_set, r.prompt_id, r.seed, r.top_p) for r in responses}
    assert len(keys) == len(responses)
    scores = Evaluation.read(folder / "Student.json").datasets["asked, top-p 0.8"]
    for place, seed in enumerate(SEEDS):
        own = [r for r in responses if (r.test_set, r.seed, r.top_p) == ("asked", seed, 0.8)]
        assert [len(r.references) for r in own] == [2, 2, 0, 2]
        found = [r.rouge_l for r in own if r.rouge_l is not None]
        assert scores.rouge_l is not None
        assert scores.rouge_l[place] == pytest.approx(sum(found) / 3)
        assert scores.response_tokens[place] == sum(r.num_tokens for r in own) / 4


def test_exposure_is_measured_where_a_model_samples_from_itself(folder: Path):
    """The teacher is at no distance from itself; the random student is; a sharpened one is not measured."""
    for label, is_far in (("Teacher", False), ("Student", True)):
        datasets = Evaluation.read(folder / f"{label}.json").datasets
        for name in ("test", "asked"):
            exposure = datasets[name].exposure
            assert exposure is not None
            assert exposure.top_p == 0.8
            assert len(exposure.forward_kl) == len(SEEDS)
            assert (min(exposure.forward_kl) > 1.0) == is_far
            assert (max(exposure.forward_kl) < 1e-5) == (not is_far)
            assert (max(exposure.reverse_kl) < 1e-5) == (not is_far)
            assert exposure.positions == list(range(1, len(exposure.positions) + 1))
            assert exposure.reach_student_T[0] == exposure.reach_teacher_T[0] == 1.0
            assert (exposure.excess_error_T == [0.0] * len(exposure.positions)) == (not is_far)
            assert all(0 <= rate <= 1 for rate in exposure.out_of_set_rate)
        assert datasets["test, top-p 0.8"].exposure is None
    # Of 600 tokens the teacher's sets hold few: nearly all of a random student's tokens are outside.
    student = Evaluation.read(folder / "Student.json").datasets["test"].exposure
    assert student is not None
    assert min(student.out_of_set_rate) > 0.8
    assert all(scores.exposure is None for scores in Evaluation.read(folder / "Cold.json").datasets.values())


def test_a_label_stands_for_one_model(inputs: Path, folder: Path):
    """A label whose file holds another model's evaluation is refused before anything starts, and nothing changes."""
    before = (folder / "Teacher.json").read_bytes()
    refused = evaluate(inputs, f"Teacher={inputs / 'student'}")
    assert refused.returncode == 2, refused.stdout
    assert "Teacher.json: holds the evaluation of another model" in refused.stdout
    assert (folder / "Teacher.json").read_bytes() == before
