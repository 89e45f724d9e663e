"""What can be known of a model before anything loads it: files, configuration, size, and that no code comes with it."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_bd.errors import DataError
from openrlhf_bd.paths import looks_like_path, nearest_path_hint

STUDENT_OPTION = "--actor.model_name_or_path"

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CODE_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
_TOKENIZER = "tokenizer.json"
# How the classes of models end that write text: transformers' own, and those of its older families.
_TEXT_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a decoder's memory for sequences follows from.

    Attributes:
        num_layers: of the decoder.
        hidden_size: numbers of a token between layers.
        query_size: attention heads times head size.
        key_size: key-value heads times head size.
        feed_forward_size: numbers of a token inside the feed-forward layer.
    """

    num_layers: int
    hidden_size: int
    query_size: int
    key_size: int
    feed_forward_size: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A causal language model as its files describe it.

    Attributes:
        name: folder, or name on the hub.
        family: `model_type` of its configuration.
        vocab_size: rows of the output embedding.
        max_positions: longest sequence, tokens; None where the model sets no limit of its own.
        num_heads: attention heads; None where the configuration has no such number.
        head_size: numbers of one head's keys; None where that is not known, or not one number.
        num_parameters: from the weight files' headers; of a model on the hub from its configuration, and None where
            that does not say it.
        shape: None where the configuration lacks a number of it.
    """

    name: str
    family: str
    vocab_size: int
    max_positions: int | None
    num_heads: int | None
    head_size: int | None
    num_parameters: int | None
    shape: ModelShape | None = None


def inspect_model(name: str, *, option: str, trust_remote_code: bool) -> ModelFacts:
    """Check a model's files without loading weights or running its code.

    Args:
        name: folder, or name on the hub.
        option: flag that gave the name, for messages.
        trust_remote_code: accept Python code in the folder.

    Raises:
        DataError: there is no such model, its weights are not whole safetensors files, its configuration cannot be
            read, or it brings code.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = [path.name for path in folder.iterdir()]
        _check_files(files, name, option, trust_remote_code)
        if not trust_remote_code:
            _refuse_auto_map(folder, option)
        if (folder / _TOKENIZER).is_file():
            _read_json(folder / _TOKENIZER, option)
        num_parameters = sum(_count_parameters(folder / file, option) for file in _weight_files(folder, option))
    elif folder.exists() or looks_like_path(name) or not _HUB_NAME.fullmatch(name):
        what = "is a file" if folder.exists() else f"there is no such folder{nearest_path_hint(folder)}"
        raise DataError(f"{name}: {what}; expected a model folder, or a model's name on the hub ({option})")
    else:
        _check_files(_hub_files(name, option), name, option, trust_remote_code)
        num_parameters = None
    return _read_config(name, option, trust_remote_code, num_parameters)


def _check_files(files: Iterable[str], name: str, option: str, trust_remote_code: bool) -> None:
    files = sorted(files)
    scripts = [file for file in files if file.endswith(".py")]
    if scripts and not trust_remote_code:
        raise DataError(
            f"{name}: brings Python code ({scripts[0]}), which is not run unless --trust_remote_code is given; read it "
            f"first, or take another model ({option})"
        )
    if "config.json" not in files:
        raise DataError(f"{name}: has no config.json; expected a model as save_pretrained() writes it ({option})")
    if any(file.endswith(".safetensors") for file in files):
        return
    pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth"))]
    found = f"only {pickles[0]}, whose format can run code when it is loaded" if pickles else "no weights"
    raise DataError(
        f"{name}: has {found}; expected *.safetensors. Load the model where you trust it and save it again by "
        f"save_pretrained(), which writes safetensors ({option})"
    )


def _refuse_auto_map(folder: Path, option: str) -> None:
    for file in _CODE_CONFIGS:
        if (folder / file).is_file() and "auto_map" in _read_json(folder / file, option):
            raise DataError(
                f"{folder / file}: has an auto_map, which loads Python code; that code is not run unless "
                f"--trust_remote_code is given. Read it first, or take another model ({option})"
            )


def _weight_files(folder: Path, option: str) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(path.name for path in folder.glob("*.safetensors"))
    weight_map = _read_json(index, option).get("weight_map", {})
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing or not files:
        listed = ", ".join(missing[:3]) or "nothing"
        raise DataError(f"{index}: lists {listed}, which the folder lacks; copy or download the model again ({option})")
    return files


def _count_parameters(path: Path, option: str) -> int:
    """Numbers in a safetensors file, by its header; also checks that the file is as long as the header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        (header_bytes,) = struct.unpack("<Q", start.ljust(8, b"\0"))
        if size < 8 or header_bytes > min(_MAX_HEADER_BYTES, size - 8):
            pointer = start.startswith(b"version ")
            what = (
                "a Git LFS pointer, not the file itself; run git lfs pull" if pointer else "no whole safetensors file"
            )
            raise DataError(f"{path}: is {what}. Copy or download the model again ({option})")
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError:
            raise DataError(f"{path}: has a damaged header; copy or download the model again ({option})") from None
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + header_bytes + max((entry["data_offsets"][1] for entry in tensors), default=0)
    if size != expected:
        raise DataError(f"{path}: has {size} bytes, expected {expected}; copy or download the model again ({option})")
    return sum(_product(entry["shape"]) for entry in tensors)


def _product(shape: list[int]) -> int:
    product = 1
    for extent in shape:
        product *= extent
    return product


def _read_json(path: Path, option: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}; copy or download the model again ({option})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: found a {type(found).__name__}, expected a JSON object ({option})")
    return found


def _hub_files(name: str, option: str) -> list[str]:
    """Files of a model on the hub; where the hub cannot be reached, those of its local copy."""
    from httpx import HTTPError
    from huggingface_hub import HfApi, snapshot_download

    try:
        return HfApi().list_repo_files(name)
    except (OSError, ValueError, HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    try:
        return [path.name for path in Path(snapshot_download(name, local_files_only=True)).iterdir()]
    except (OSError, ValueError):
        raise DataError(
            f"{name}: is no folder here{nearest_path_hint(name)}, and the hub gave no such model: {reason}; "
            f"expected a model folder, or a model's name on the hub ({option})"
        ) from None


def _read_config(name: str, option: str, trust_remote_code: bool, num_parameters: int | None) -> ModelFacts:
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).get_text_config()
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name}: its configuration cannot be read: {reason}; expected a model as save_pretrained() writes it "
            f"({option})"
        ) from error
    if not trust_remote_code:
        _check_architectures(config.architectures, name, option)
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(vocab_size, int):
        raise DataError(f"{name}: has no vocab_size; expected a causal language model ({option})")
    scaling = getattr(config, "rope_parameters", None) or {}
    scaled = isinstance(scaling, dict) and "factor" in scaling
    return ModelFacts(
        name=name,
        family=config.model_type,
        vocab_size=vocab_size,
        max_positions=None if scaled else getattr(config, "max_position_embeddings", None),
        num_heads=getattr(config, "num_attention_heads", None),
        head_size=_head_size(config),
        num_parameters=_parameters_of(config) if num_parameters is None else num_parameters,
        shape=_shape(config),
    )


def _parameters_of(config: Any) -> int | None:
    """Numbers of the model that a configuration describes; shared ones count once."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, AttributeError, ImportError):
        return None
    return sum(parameter.numel() for parameter in model.parameters())


def _shape(config: Any) -> ModelShape | None:
    num_layers, hidden_size = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    num_heads, head_size = getattr(config, "num_attention_heads", None), _head_size(config)
    if not num_layers or not hidden_size or not num_heads or not head_size:
        return None
    # GPT-2's n_inner and OPT's ffn_dim; four times the hidden size is what the former means by none.
    sizes = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        query_size=num_heads * head_size,
        key_size=(getattr(config, "num_key_value_heads", None) or num_heads) * head_size,
        feed_forward_size=next((size for size in sizes if size), 4 * hidden_size),
    )


def _check_architectures(architectures: list[str] | None, name: str, option: str) -> None:
    if architectures and not any(architecture.endswith(_TEXT_GENERATORS) for architecture in architectures):
        raise DataError(
            f"{name}: its config.json says {', '.join(architectures)}, which generates no text; expected a causal "
            f"language model, with a name that ends in {' or '.join(_TEXT_GENERATORS)} ({option})"
        )


def _head_size(config: Any) -> int | None:
    hidden_size, num_heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if getattr(config, "kv_lora_rank", None) is not None:
        return None  # latent attention: its kernels go by other numbers
    given = getattr(config, "head_dim", None)
    if given is not None or not hidden_size or not num_heads:
        return given
    return int(hidden_size) // int(num_heads)
