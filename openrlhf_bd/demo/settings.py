"""Options of the demo's jobs, in the form of a YAML file of the main job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.config import DistillConfig
from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.errors import ConfigError

CHECKER = "openrlhf_bd.demo.corpus:is_correct"
SFT = "sft"
CONTINUED_SFT = "sft:continued"


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the demo is. The default fits two CPU cores and a quarter of an hour.

    Attributes:
        num_train: prompts, with a gold response each.
        num_validation: validation records.
        num_test: test records, answered once a seed.
        num_samples: the teacher's responses to a prompt.
        sft_steps: steps of the student's own SFT, from random weights.
        steps: steps of each method after it.
        num_validations: times that a method's student is validated.
    """

    num_train: int = 3000
    num_validation: int = 100
    num_test: int = 200
    num_samples: int = 4
    sft_steps: int = 1000
    steps: int = 500
    num_validations: int = 4


TINY = Scale(64, 8, 8, 2, 4, 4, 2)


@dataclass(frozen=True, slots=True)
class Method:
    """A registered algorithm, for `bd` its preset, and its mode: "bd:robust", "seqkd", "bd:robust@online"."""

    label: str
    name: str
    preset: str | None
    mode: str = "offline"

    @property
    def folder(self) -> str:
        return self.label.replace(":", "-").replace("@", "-")


def parse_methods(text: str) -> list[Method]:
    """Methods of `--methods "bd:robust seqkd"`.

    Raises:
        ConfigError: none is named, or one twice.
    """
    labels = text.replace(",", " ").split()
    if not labels or len(set(labels)) != len(labels):
        raise ConfigError(
            f"--methods is {text!r}; expected one or more different methods, such as bd:robust bd:paper seqkd"
        )
    return [Method(label, *_split(label)) for label in labels]


def _split(label: str) -> tuple[str, str | None, str]:
    method, _, mode = label.partition("@")
    name, colon, preset = method.partition(":")
    return name, (preset if colon else "robust" if name == "bd" else None), mode or "offline"


def with_online(methods: Sequence[Method]) -> list[Method]:
    """Each method that can learn from the student's own rollouts also online, right after itself."""
    found: list[Method] = []
    for method in methods:
        found.append(method)
        options = DistillConfig.model_validate({"name": method.name, **_preset(method)})
        needs = resolve_algorithm(method.name).needs_of(options)
        online = replace(method, label=f"{method.label}@online", mode="online")
        if method.mode == "offline" and needs.student_rollouts != "never" and online not in methods:
            found.append(online)
    return found


def _preset(method: Method) -> dict[str, str]:
    return {} if method.preset is None else {"preset": method.preset}


class Layout:
    """Where the demo's files are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpus = root / "corpus"
        self.student_init = root / "student_init"
        self.sft = root / "sft"
        self.store = root / "teacher_data"
        self.continued_sft = root / "sft-continued"
        self.evaluation = root / "evaluation"
        self.report = root / "report.html"

    def method(self, method: Method) -> Path:
        return self.root / method.folder

    def split(self, name: str) -> str:
        return str(self.corpus / f"{name}.jsonl")


def common_options(layout: Layout, scale: Scale, seed: int) -> dict[str, Any]:
    """What all jobs of the demo share."""
    return {
        "data": {
            "prompt_dataset": layout.split("train"),
            "input_key": "instruction",
            "context_key": "input",
            "label_key": "output",
            "prompt_wrapper": "paper",
            "max_len": 192,
            "max_prompt_len": 96,
        },
        "rollout": {"n_samples_per_prompt": scale.num_samples, "max_new_tokens": 96},
        "teacher": {"num_engines": 2},
        "train": {"batch_size": 32, "dynamic_batch_enable": True, "max_tokens_per_gpu": 2048, "seed": seed},
        "ds": {"zero_stage": 2, "param_dtype": "fp32"},
        "actor": {"num_gpus_per_node": 2, "max_norm": 1.0},
        "eval": {
            "dataset": layout.split("validation"),
            "temperature": 1.0,
            "max_new_tokens": 96,
            "test_top_p": [1.0],
            "checker": CHECKER,
            "teacher_nll": True,
        },
        "logger": {"logging_steps": 1},
    }


def sft_options(layout: Layout, scale: Scale, seed: int) -> dict[str, Any]:
    """The student's SFT from random weights; the z-loss keeps the level of its logits near zero."""
    return _merge(
        common_options(layout, scale, seed),
        {
            "algo": {"distill": {"name": "sft", "z_loss_coef": 0.01, "pretrain_coef": 0.0}},
            "actor": {
                "model_name_or_path": str(layout.student_init),
                "adam": {"lr": 2e-3},
                "lr_warmup_ratio": 0.02,
                "min_lr_ratio": 0.1,
            },
            "train": {"max_epochs": 100, "max_steps": scale.sft_steps},
            "eval": {"steps": scale.sft_steps},
            "ckpt": {"output_dir": str(layout.sft)},
        },
    )


def continued_sft_options(layout: Layout, scale: Scale, seed: int) -> dict[str, Any]:
    """The control: as many further steps of SFT as a method has steps."""
    options = sft_options(layout, scale, seed)
    return _merge(options, {**_second_phase(layout, scale), "ckpt": {"output_dir": str(layout.continued_sft)}})


def method_options(layout: Layout, scale: Scale, seed: int, method: Method) -> dict[str, Any]:
    """Distillation of the SFT student by one method: on the store that all share, or on rows of its own."""
    # The corpus as running text is mostly problems, which nobody can predict: with weight 1 they would take most of a
    # student this small. The published method keeps its weight.
    pretrain_coef = 1.0 if method.preset == "paper" else 0.1
    distill: dict[str, Any] = {"name": method.name, "pretrain_coef": pretrain_coef, "z_loss_coef": 0.01}
    distill |= {"mode": method.mode, **_preset(method)}
    # Online the teacher works beside the student, on the same cores.
    teacher = {"store_path": str(layout.store)} if method.mode == "offline" else {"num_engines": 1}
    return _merge(
        _merge(common_options(layout, scale, seed), _second_phase(layout, scale)),
        {
            "algo": {"distill": distill},
            "teacher": {"model_name_or_path": str(TEACHER_FOLDER), **teacher},
            "data": {"pretrain_dataset": layout.split("pretrain")},
            "train": {"pretrain_batch_size": 2},
            "ckpt": {"output_dir": str(layout.method(method))},
        },
    )


def evaluation_options(layout: Layout, scale: Scale, seed: int) -> dict[str, Any]:
    """The final evaluation of all models at the paper's seeds."""
    return _merge(
        common_options(layout, scale, seed),
        {
            "teacher": {"model_name_or_path": str(TEACHER_FOLDER)},
            "vllm": {"num_engines": 2},
            "eval": {"test_datasets": f"test={layout.split('test')}"},
            "ckpt": {"output_dir": str(layout.evaluation)},
        },
    )


def _second_phase(layout: Layout, scale: Scale) -> dict[str, Any]:
    return {
        "actor": {"model_name_or_path": str(layout.sft), "adam": {"lr": 1e-3}, "lr_warmup_ratio": 0.05},
        "train": {"max_epochs": 100, "max_steps": scale.steps},
        "eval": {"steps": max(1, scale.steps // scale.num_validations)},
    }


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
