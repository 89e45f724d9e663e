"""What the driver needs of a model folder: its tokenizer and the tokens that end a response."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.engines.arguments import stop_token_ids
from openrlhf_bd.errors import DataError


def load_tokenizer(name_or_path: str, config: Config) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Remote code runs only if the user turned it on.

    Raises:
        DataError: there is no tokenizer, or it has no end-of-sequence token.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            name_or_path,
            use_fast=not config.data.disable_fast_tokenizer,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{name_or_path}: no tokenizer could be loaded there ({error})") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"{name_or_path}: the tokenizer has no eos_token; a response needs a token that ends it")
    return tokenizer


def stop_tokens(name_or_path: str, config: Config) -> tuple[int, ...]:
    """Tokens that end a response, as the engines stop at them.

    Raises:
        DataError: the model names none.
    """
    stops = stop_token_ids(name_or_path, trust_remote_code=config.trust_remote_code)
    if not stops:
        raise DataError(
            f"{name_or_path}: neither generation_config.json nor config.json has an eos_token_id; a response needs a "
            "token that ends it. Add it to generation_config.json"
        )
    return stops
