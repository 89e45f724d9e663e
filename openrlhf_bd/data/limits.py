"""Longest prompts and sequences, as the options have them."""

from __future__ import annotations

from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError


def prompt_limit(config: Config) -> int:
    """Longest prompt, tokens: it leaves room for at least one response token.

    Raises:
        ConfigError: no prompt could be that short.
    """
    limit = config.data.max_prompt_len or config.data.max_len - 1
    if not 1 <= limit < config.data.max_len:
        raise ConfigError(
            f"--data.max_prompt_len {limit} leaves no room for a response in --data.max_len {config.data.max_len}; "
            "expected at least 1, and less than it"
        )
    return limit


def teacher_length(config: Config) -> int:
    """Longest sequence of the teacher, tokens: its prompt and a response, or the student's prompt and a response.

    Raises:
        ConfigError: it is less than the student's.
    """
    length = config.teacher.max_len or config.data.max_len
    if length < config.data.max_len:
        raise ConfigError(
            f"--teacher.max_len {length} is less than --data.max_len {config.data.max_len}, which the teacher's engine "
            "must hold too; raise it, or leave it out"
        )
    return length
