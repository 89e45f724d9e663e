"""The order of rows in a store: a function of the row ids alone, never of which engine finished first."""

import re
from collections.abc import Iterable
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_NUMBER = re.compile("\0|[0-9]+")
# Below any other character, and in this order: the end of an id, a number in it, a NUL that it holds itself.
_END, _DIGITS, _NUL = "\0\0", "\0\1", "\0\2"
_CHUNK_ROWS = 65_536


def natural_key(row_id: str) -> bytes:
    """Sort key under which numbers inside ids count as numbers: "train:9:1" < "train:10:0" < "train:10:2".

    Row ids are "<prompt_id>:<sample>", so rows come by prompt, then by sample. The id itself breaks ties ("07", "7").
    Keys are compared byte by byte, so that millions of them can be sorted without a Python object for each.
    """
    text = _NUMBER.sub(_encode, row_id) + _END + row_id
    return text.encode("utf-8", errors="surrogatepass")


def natural_order(row_ids: Iterable[str]) -> NDArray[np.int64]:
    """Numbers of the rows in the order of their natural keys."""
    keys, chunks = map(natural_key, row_ids), []
    # Arrow's own pool would keep what it needed once.
    pool = pa.system_memory_pool()
    while chunk := list(islice(keys, _CHUNK_ROWS)):
        chunks.append(pa.array(chunk, pa.binary(), memory_pool=pool))
    order: NDArray[np.uint64] = pc.sort_indices(pa.chunked_array(chunks, pa.binary()), memory_pool=pool).to_numpy()
    return order.view(np.int64)


def _encode(found: re.Match[str]) -> str:
    if found[0] == "\0":
        return _NUL
    digits = found[0].lstrip("0")
    # Of two numbers the longer is the larger; of the same length they compare as text.
    return f"{_DIGITS}{chr(len(digits))}{digits}"
