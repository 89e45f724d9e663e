"""The toy scale: models of the real architectures with random weights, and data from the embedded corpus. No network.

A scale file describes both (`configs/paper/scales/toy.yaml`). Whatever is made is a function of its description, so a
folder that is there already is used as it is.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import AfterValidator, Field, ValidationError, model_validator
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from openrlhf_bd.config import Count, PositiveInt, Section
from openrlhf_bd.demo.corpus import as_document, choose_families, generate_split, write_jsonl
from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.store.files import write_text

# Wider than the families' own: models this narrow learn markedly faster from it.
_INITIAL_SPREAD = 0.06

Described = TypeVar("Described", bound=Section)


def _known(tasks: list[str] | None) -> list[str] | None:
    choose_families(tasks)
    return tasks


Tasks = Annotated[list[str] | None, AfterValidator(_known)]


class ToyModel(Section):
    """A model at toy width.

    `base: demo_teacher` is the trained teacher that the package ships, a Qwen2 model. Its positions are rotations and
    have no weights: `max_len` alone says how many it takes, whatever lengths it was trained at.
    """

    family: Literal["gpt2", "opt", "qwen2"] = Field(description="architecture: that of the model it stands for")
    base: Literal["random", "demo_teacher"] = Field("random", description="random weights, or the shipped teacher")
    hidden_size: PositiveInt = Field(64, description="width of the residual stream")
    num_layers: PositiveInt = Field(2, description="layers")
    head_size: Literal[32, 64] = Field(32, description="width of a head; vLLM's CPU kernels know these")
    embedding_size: PositiveInt | None = Field(
        None, description="opt: width of the embeddings, which opt-350m projects; none: hidden_size"
    )
    post_norm: bool = Field(False, description="opt: norms after each block, as in opt-350m")
    max_len: PositiveInt = Field(256, description="positions")
    seed: Count = Field(0, description="of the weights")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % self.head_size:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of head_size {self.head_size}")
        if self.family != "opt" and (self.embedding_size is not None or self.post_norm):
            raise ValueError("embedding_size and post_norm belong to family opt")
        if self.base == "demo_teacher" and self.family != "qwen2":
            raise ValueError("base demo_teacher is of family qwen2")
        return self


class ToyTestSet(Section):
    """One of the test sets: problems of some of the corpus' families, none of which is in another split."""

    num_records: PositiveInt = Field(description="records")
    tasks: Tasks = Field(None, description="families of problems; none: all that there is training data of")


class ToyData(Section):
    """The embedded corpus as data: `train`, `validation`, `pretrain`, `pretrain_opt`, and test sets by their names."""

    num_train: PositiveInt = Field(description="prompts, with a gold response each")
    num_validation: PositiveInt = Field(description="validation records")
    tasks: Tasks = Field(None, description="families of problems (demo.tasks); none: all")
    tests: Annotated[dict[str, ToyTestSet], Field(min_length=1)] = Field(description="test sets by name")
    seed: Count = Field(0, description="of every random choice")


def read_toy_models(values: Mapping[str, Any], *, where: str) -> dict[str, ToyModel]:
    """The models that a scale file describes, by name.

    Raises:
        ConfigError: an unknown key, or a value that does not fit; the message begins with `where`.
    """
    return {name: _read(ToyModel, value, f"{where}: models.{name}") for name, value in values.items()}


def read_toy_data(values: Mapping[str, Any], *, where: str) -> ToyData:
    """The data that a scale file describes.

    Raises:
        ConfigError: see `read_toy_models`.
    """
    return _read(ToyData, values, f"{where}: data")


def _read(kind: type[Described], value: Any, where: str) -> Described:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "its keys"
        raise ConfigError(f"{where}: {key}: {first['msg']}; found {first['input']!r}") from None


def make_model(model: ToyModel, folder: Path) -> Path:
    """Write a Hugging Face folder with the embedded corpus' tokenizer, unless it is there.

    Args:
        model: its description.
        folder: of the model; whole, or not there at all, whenever the process is killed.

    Returns:
        The folder.
    """
    return folder if folder.exists() else _whole(folder, lambda partial: _write_model(model, partial))


def make_data(data: ToyData, folder: Path) -> dict[str, Path]:
    """Write the corpus as JSONL files, unless they are there.

    Splits are disjoint in their problems (demo.corpus). The pre-training text is the training records as running text,
    as in the demo: it brings no example that SFT does not see. Both pre-training corpora of the paper are this text.

    Returns:
        Path of each file by the name that experiment files know it by.
    """
    if not folder.exists():
        _whole(folder, lambda partial: _write_data(data, partial))
    names = {name: name for name in ("train", "validation", "pretrain", *data.tests)} | {"pretrain_opt": "pretrain"}
    return {name: folder / f"{file}.jsonl" for name, file in names.items()}


def _whole(folder: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder under another name, then rename it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(partial)
        partial.chmod(0o755)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_model(model: ToyModel, folder: Path) -> None:
    if model.base == "demo_teacher":
        shutil.copytree(TEACHER_FOLDER, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["max_position_embeddings"] = model.max_len
        write_text(folder / "config.json", json.dumps(config, indent=2))
        return
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(TEACHER_FOLDER))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        built = build_model(model, tokenizer).float()
    built.generation_config = GenerationConfig(do_sample=True, eos_token_id=tokenizer.eos_token_id)
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_model(model: ToyModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model with random weights of torch's global generator."""
    build = {"gpt2": _gpt2, "opt": _opt, "qwen2": _qwen2}[model.family]
    # Padding has no id of its own: in OPT it would turn an embedding off.
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    return build(model, {"vocab_size": len(tokenizer), "tie_word_embeddings": True, "dtype": "float32", **tokens})


def _gpt2(model: ToyModel, common: dict[str, Any]) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.hidden_size // model.head_size,
            n_positions=model.max_len,
            initializer_range=_INITIAL_SPREAD,
            **common,
        )
    )


def _opt(model: ToyModel, common: dict[str, Any]) -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.hidden_size // model.head_size,
            ffn_dim=4 * model.hidden_size,
            word_embed_proj_dim=model.embedding_size or model.hidden_size,
            do_layer_norm_before=not model.post_norm,
            max_position_embeddings=model.max_len,
            init_std=_INITIAL_SPREAD,
            **common,
        )
    )


def _qwen2(model: ToyModel, common: dict[str, Any]) -> PreTrainedModel:
    num_heads = model.hidden_size // model.head_size
    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=num_heads,
            # Grouped queries, as in the real models.
            num_key_value_heads=1 if num_heads % 2 else num_heads // 2,
            intermediate_size=5 * model.hidden_size // 2,
            max_position_embeddings=model.max_len,
            initializer_range=_INITIAL_SPREAD,
            **common,
        )
    )


def _write_data(data: ToyData, folder: Path) -> None:
    train = generate_split("train", data.num_train, data.seed, data.tasks)
    write_jsonl(folder / "train.jsonl", train)
    validation = generate_split("validation", data.num_validation, data.seed, data.tasks)
    write_jsonl(folder / "validation.jsonl", validation)
    write_jsonl(folder / "pretrain.jsonl", ({"text": as_document(record)} for record in train))
    for name, test in data.tests.items():
        # A seed of its own for each set: a problem may be in two of them, the wording and order are not the same.
        records = generate_split("test", test.num_records, f"{name}:{data.seed}", test.tasks or data.tasks)
        write_jsonl(folder / f"{name}.jsonl", records)
