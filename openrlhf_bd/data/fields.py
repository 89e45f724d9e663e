"""Values of a record, checked: an error names file and line, what stands there, and the option that chose the key."""

from __future__ import annotations

import difflib
from typing import Any

from openrlhf_bd.data.readers import Record
from openrlhf_bd.errors import DataError

_SHOWN_CHARACTERS = 40


def text_field(record: Record, key: str, *, option: str, allow_empty: bool = False) -> str:
    """A text of a record.

    Args:
        record: the record.
        key: name of the value.
        option: option that chose the key, for messages.
        allow_empty: accept an empty text, and null as one.

    Raises:
        DataError: there is no such key, or the value is no text that can be tokenised, or is empty.
    """
    value = _value(record, key, option)
    if allow_empty and value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f'{record.where}: "{key}" is {_shown(value)}; expected a text (see {option})')
    if not value.strip() and not allow_empty:
        raise DataError(
            f'{record.where}: "{key}" is empty; every record needs a non-empty text there (see {option}). '
            "Fill it in, or take the record out"
        )
    return _encodable(value, record, key)


def reference_field(record: Record, key: str, *, several: bool) -> str | list[str]:
    """The reference response of a record; with `several`, also a list of them.

    Raises:
        DataError: see `text_field`.
    """
    value = _value(record, key, "--data.label_key")
    if several and isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [_encodable(item, record, key) for item in value]
    return text_field(record, key, option="--data.label_key")


def messages_field(record: Record, key: str) -> str | list[dict[str, Any]]:
    """An instruction, or a conversation: a list of messages with "role" and "content".

    Raises:
        DataError: it is neither.
    """
    value = _value(record, key, "--data.input_key")
    if not isinstance(value, list):
        return text_field(record, key, option="--data.input_key")
    if not value or not all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value):
        raise DataError(
            f'{record.where}: "{key}" is {_shown(value)}; expected a text, or a list of messages with "role" and '
            '"content" (see --data.input_key)'
        )
    return value


def _value(record: Record, key: str, option: str) -> Any:
    if key in record.values:
        return record.values[key]
    keys = ", ".join(f'"{name}"' for name in record.values) or "no key at all"
    close = difflib.get_close_matches(key, record.values, n=1)
    hint = f"; did you mean {option} {close[0]}?" if close else f"; every record needs a text there (see {option})"
    raise DataError(f'{record.where}: "{key}" is missing, the record has {keys}{hint}')


def _encodable(text: str, record: Record, key: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f'{record.where}: "{key}" holds half of a surrogate pair at character {error.start}, which is no text; '
            "correct the record"
        ) from None
    return text


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return f"a {type(value).__name__}, {text}"
