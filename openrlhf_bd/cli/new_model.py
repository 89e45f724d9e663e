"""`openrlhf-bd new-model`: a randomly initialised model with a given tokenizer, to train small models from scratch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openrlhf_bd.cli.flags import main_guard
from openrlhf_bd.errors import ConfigError, DataError, RunFolderError
from openrlhf_bd.store.fingerprints import fingerprint_tokenizer

# The names of one shape in each family's configuration.
_FAMILIES: dict[str, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_len": "n_positions",
    },
    "opt": {
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "intermediate_size": "ffn_dim",
        "max_len": "max_position_embeddings",
    },
    **{
        family: {
            "hidden_size": "hidden_size",
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "intermediate_size": "intermediate_size",
            "max_len": "max_position_embeddings",
        }
        for family in ("qwen2", "qwen3", "llama")
    },
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openrlhf-bd new-model", description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder or hub name of the tokenizer")
    parser.add_argument("--output_dir", required=True, help="new folder of the model")
    parser.add_argument("--model_type", choices=sorted(_FAMILIES), default="qwen2")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--num_heads", type=int, default=4, help="head size 32 or 64 for vLLM on CPUs")
    parser.add_argument("--num_kv_heads", type=int, default=2, help="where the family has them")
    parser.add_argument("--intermediate_size", type=int, default=384)
    parser.add_argument("--max_len", type=int, default=1024, help="longest sequence, tokens")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def create_model(arguments: argparse.Namespace) -> Path:
    """Write config, weights (fp32, tied embeddings) and tokenizer to a new folder.

    Raises:
        RunFolderError: the folder exists.
        ConfigError: a size does not fit the others.
        DataError: the tokenizer cannot be loaded.
    """
    _check_sizes(arguments)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = Path(arguments.output_dir)
    if folder.exists():
        raise RunFolderError(f"--output_dir {folder}: exists already, expected a new folder; name another path")
    tokenizer = _load_tokenizer(arguments.tokenizer)
    names = _FAMILIES[arguments.model_type]
    shape = {name: getattr(arguments, option) for option, name in names.items()}
    config = AutoConfig.for_model(
        arguments.model_type,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=True,
        **shape,
    )
    if arguments.model_type == "opt":
        config.word_embed_proj_dim = arguments.hidden_size
    if arguments.model_type == "qwen3":
        config.head_dim = arguments.hidden_size // arguments.num_heads
    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers reads some families' tokenizers by a class of its own choice, whatever the folder names.
    read = _load_tokenizer(str(folder))
    if fingerprint_tokenizer(read) != fingerprint_tokenizer(tokenizer):
        print(
            f"note: transformers reads the tokenizer of a {arguments.model_type} folder as {type(read).__name__}, "
            f"which splits text otherwise than {arguments.tokenizer}; another --model_type may keep it. Teacher and "
            "student of one run must be alike"
        )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {arguments.model_type}, {num_parameters / 1e6:.1f} million parameters, seed {arguments.seed}")
    return folder


def _check_sizes(arguments: argparse.Namespace) -> None:
    for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "max_len"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} is {getattr(arguments, name)}; expected at least 1")
    if arguments.hidden_size % arguments.num_heads:
        raise ConfigError(
            f"--num_heads {arguments.num_heads} does not divide --hidden_size {arguments.hidden_size}; choose a divisor"
        )
    if "num_kv_heads" in _FAMILIES[arguments.model_type] and arguments.num_heads % arguments.num_kv_heads:
        raise ConfigError(
            f"--num_kv_heads {arguments.num_kv_heads} does not divide --num_heads {arguments.num_heads}; choose a "
            "divisor"
        )


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"--tokenizer {name}: no tokenizer could be loaded there ({reason}); expected a folder with one, or a name "
            "on the hub"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit status 2 where the folder exists, a size does not fit, or there is no tokenizer."""

    def run() -> int:
        create_model(_parser().parse_args(argv))
        return 0

    return main_guard(run)


if __name__ == "__main__":
    raise SystemExit(main())
