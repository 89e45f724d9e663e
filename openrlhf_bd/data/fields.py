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


def reference_field(record: Record, key: str) -> str:
    """The reference response of a record that a student learns from.

    Raises:
        DataError: see `text_field`.
    """
    return text_field(record, key, option="--data.label_key")


def reference_fields(record: Record, key: str, *, allow_missing: bool) -> list[str]:
    """The reference responses of a record to evaluate: a text, or a list of any number of them.

    Args:
        record: the record.
        key: name of the value.
        allow_missing: a record without the key, with null, an empty text or an empty list has none.

    Raises:
        DataError: it has none though it must, or what stands there is neither a text nor a list of texts.
    """
    value = record.values.get(key)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        if allow_missing:
            return []
        skip = "or leave records without a reference out of Rouge-L by --eval.missing_references skip"
        try:
            found = _value(record, key, "--data.label_key")
        except DataError as error:
            raise DataError(f"{error}; {skip}") from None
        raise DataError(
            f'{record.where}: "{key}" is {_shown(found)}; expected a reference response, a text or a list of texts '
            f"(see --data.label_key). Fill it in, take the record out, {skip}"
        )
    if isinstance(value, str):
        return [_encodable(value, record, key)]
    if not isinstance(value, list):
        raise DataError(
            f'{record.where}: "{key}" is {_shown(value)}; expected a text or a list of texts, the reference responses '
            "(see --data.label_key). Correct the record"
        )
    for number, item in enumerate(value, start=1):
        if not isinstance(item, str) or not item.strip():
            raise DataError(
                f'{record.where}: reference {number} of {len(value)} in "{key}" is {_shown(item)}; expected a text '
                "that is not empty (see --data.label_key). Correct it, or take it out of the list"
            )
    return [_encodable(item, record, key) for item in value]


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
    if isinstance(value, str | list) and (not value or (isinstance(value, str) and not value.strip())):
        return "empty"
    text = repr(value)
    text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return f"a {type(value).__name__}, {text}"
