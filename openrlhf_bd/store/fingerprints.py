"""Fingerprints: equal when two things do the same, different when they don't. File names and paths don't count.

Each is 32 hexadecimal characters, except that of a model on a hub, which is its name and revision.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openrlhf_bd.errors import DataError
from openrlhf_bd.store.files import sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys of config.json that say where a model came from or what wrote it, not what it computes.
_PROVENANCE_KEYS = ("_name_or_path", "_commit_hash", "transformers_version")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Tokenizers without a backend description are told apart by their vocabulary and by what they make of these.
_PROBES = ("Hello  world\n", " 3.14 + 42\t= ?", "don't DON'T", "naïve Ünïcödé 东京 🙂", "<s>[INST] </s><|endoftext|>")


def fingerprint_json(value: Any) -> str:
    """Fingerprint of a JSON value: BLAKE2b of its canonical text (sorted keys, no spaces).

    Raises:
        TypeError, ValueError: the value is not JSON, or holds a number that is not finite.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=16).hexdigest()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of what a tokenizer does between text and ids: vocabulary, merges, normalisation, special tokens.

    The chat template does not count (it belongs to the prompts), nor do padding and truncation (they reach no row).
    """
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # A call with padding=True or truncation=True leaves its settings behind in the backend.
        backend.pop("padding", None)
        backend.pop("truncation", None)
        return fingerprint_json({"backend": backend, "special": special})
    probes = [tokenizer.encode(probe) for probe in _PROBES]
    return fingerprint_json({"vocabulary": tokenizer.get_vocab(), "probes": probes, "special": special})


def fingerprint_model_folder(path: str | Path, revision: str | None = None) -> str:
    """Fingerprint of a model: its configuration and the bytes of its safetensors files.

    Args:
        path: folder of a Hugging Face model; or its name on a hub, whose fingerprint is "hub:<name>@<revision>".
        revision: of the model on the hub; None means "main", which may move. Ignored for a folder.

    Raises:
        DataError: the folder is missing, or lacks config.json or safetensors weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not _HUB_NAME.fullmatch(str(path)) or folder.exists():
            raise DataError(
                f"{path}: expected a model folder or a model's name on the hub, found neither; check the path"
            )
        return f"hub:{path}@{revision or 'main'}"
    config_path, weights = folder / "config.json", sorted(folder.glob("*.safetensors"))
    if not config_path.is_file() or not weights:
        raise DataError(
            f"{folder}: expected config.json and at least one *.safetensors file; "
            "save the model by save_pretrained(), or name another folder"
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{config_path}: not JSON ({error}); save the model again") from None
    for key in _PROVENANCE_KEYS:
        config.pop(key, None)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return fingerprint_json({"config": config, "weights": sorted(pool.map(_sha256, weights))})


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, size_bytes: int, mtime_ns: int) -> str:
    """Weights are large, and a job asks for their fingerprint before it starts and when it makes rows."""
    return sha256_file(path)
