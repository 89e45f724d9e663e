"""A small experiment on disk: a fine-tuned teacher, its rows, two students and their evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from openrlhf_bd.cli.flags import given_flags
from openrlhf_bd.cli.pipeline import judge_flags
from openrlhf_bd.experiments.digests import InputDigests
from openrlhf_bd.experiments.layers import Mode
from openrlhf_bd.experiments.prepare import Prepared, Request, check_options, prepare

SFT_OPTIONS = 'options: {algo.distill.name: sft, actor.model_name_or_path: "${models.small}"}'
ROWS_OPTIONS = 'options: {teacher.model_name_or_path: "${stages.teacher}"}'
EXPERIMENT = """
title: Small
stages:
  evaluation:
    kind: evaluate
    group: Tiny
    extends: pieces/common.yaml
    options: {eval.test_datasets: "test=${data.test}", teacher.model_name_or_path: "${stages.teacher}"}
    models: {Teacher: "${stages.teacher}", SFT: "${stages.sft}", BD: "${stages.bd}"}
    reference: Teacher
  teacher:
    extends: pieces/common.yaml
    options: {algo.distill.name: sft, actor.model_name_or_path: "${models.large}"}
  rows:
    kind: generate
    extends: pieces/common.yaml
    options: {teacher.model_name_or_path: "${stages.teacher}"}
  sft:
    label: SFT
    extends: pieces/common.yaml
    options: {algo.distill.name: sft, actor.model_name_or_path: "${models.small}"}
  bd:
    label: BD
    extends: pieces/common.yaml
    options:
      teacher: {model_name_or_path: "${stages.teacher}", store_path: "${stages.rows}/teacher_data"}
      actor: {model_name_or_path: "${stages.sft}"}
"""
COMMON = """
data: {prompt_dataset: "${data.train}", input_key: instruction, label_key: output}
train: {batch_size: 8, max_steps: 4}
"""
SCALE = """
models: {large: example/large, small: example/small}
data: {train: train.jsonl, test: test.jsonl, unused: not-there.jsonl}
"""


class Case:
    """The files of an experiment, and what comes of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("experiment.yaml", EXPERIMENT)
        self.write("pieces/common.yaml", COMMON)
        self.write("scales/full.yaml", SCALE)
        self.write("data/train.jsonl", '{"instruction": "a", "output": "b"}\n')
        self.write("data/test.jsonl", '{"instruction": "c", "output": "d"}\n')

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.root / name).read_text(encoding="utf-8")
        assert old in text
        self.write(name, text.replace(old, new))

    def prepared(
        self, *, mode: Mode = "offline", only: str | None = None, scale: str | None = None, **flags: str | list[str]
    ) -> Prepared:
        """Stages with keys; `flags` with __ for the dots of their names."""
        arguments = {name.replace("__", "."): value for name, value in flags.items()}
        request = Request(
            output_dir=self.root / "out",
            scale=scale,
            data_dir=self.root / "data",
            mode=mode,
            only=only,
            flags=given_flags(arguments) | given_flags(arguments, judge_flags()),
        )
        checked = check_options(self.root / "experiment.yaml", request)
        return prepare(checked, request, InputDigests(), inputs_dir=self.root / "out")

    def keys(self, **flags: str | list[str]) -> dict[str, str]:
        """Keys of all stages."""
        return {name: stage.key for name, stage in self.prepared(**flags).stages.items()}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)
