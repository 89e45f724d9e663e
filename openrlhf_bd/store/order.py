"""The order of rows in a store: a function of the row ids alone, never of which engine finished first."""

import re

_DIGITS = re.compile(r"([0-9]+)")


def natural_key(row_id: str) -> tuple[tuple[str | int, ...], str]:
    """Sort key under which numbers inside ids count as numbers: "train:9:1" < "train:10:0" < "train:10:2".

    Row ids are "<prompt_id>:<sample>", so rows come by prompt, then by sample. The id itself breaks ties ("07", "7").
    """
    # The split alternates text, digits, text, ...: the same places hold the same type in any two keys.
    parts = _DIGITS.split(row_id)
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts)), row_id
