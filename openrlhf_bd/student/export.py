"""The student as a Hugging Face folder: safetensors, configuration and tokenizer, there whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from openrlhf_bd.config import Config
from openrlhf_bd.student.checkpoints import PARTIAL, replace_folder
from openrlhf_bd.student.lora import ADAPTER_FOLDER, merged_weights, save_adapter
from openrlhf_bd.student.model import state_dict_of
from openrlhf_bd.student.strategy import BellmanStrategy

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def save_hf(engine: Any, strategy: BellmanStrategy, target: Path, config: Config) -> None:
    """Save the student's weights in their own type under their own names. Collective.

    With adapters the folder holds the merged model, which loads like any other, and the adapters alone in `adapter/`.

    Args:
        engine: DeepSpeed engine around the student.
        strategy: of this rank.
        target: folder to make; replaced if it is there.
        config: options of the job; the tokenizer of --actor.model_name_or_path is copied as it is.

    Raises:
        OSError: the folder cannot be written; on all ranks.
    """
    source = str(config.actor.model_name_or_path)
    model = engine.module.model
    weights = state_dict_of(engine, zero_stage=strategy.stage)
    partial = target.with_name(target.name + PARTIAL)

    def write() -> None:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        model.save_pretrained(partial, state_dict=merged_weights(model, weights))
        if config.ds.lora.rank > 0:
            save_adapter(model, weights, config, partial / ADAPTER_FOLDER)
        copy_tokenizer(source, partial, trust_remote_code=config.trust_remote_code)
        replace_folder(partial, target)

    strategy.on_rank_0(write)


def copy_tokenizer(source: str, target: Path, *, trust_remote_code: bool) -> None:
    """Copy a model's tokenizer, byte for byte where the model is a folder; a folder may have none."""
    if Path(source).is_dir():
        for file in (Path(source) / name for name in TOKENIZER_FILES):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
        return
    AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code).save_pretrained(target)
