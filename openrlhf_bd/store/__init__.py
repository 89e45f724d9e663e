"""The data on disk between teacher and student: sealed Parquet shards, their journal, and a manifest.

`StoreWriter` appends rollouts and can be killed at any moment; `StoreReader` gives them back in an order that depends
on the row ids alone; `summary` says what is in a store. See `shards` for the columns, `manifest` for `manifest.json`,
`journal` for the list of shards, and `folder` for the places where all this may lie.
"""

from openrlhf_bd.store.cut_sets import incomplete_share
from openrlhf_bd.store.manifest import StoreManifest
from openrlhf_bd.store.reader import StoreReader
from openrlhf_bd.store.statistics import StoreSummary, one_token_share, summary
from openrlhf_bd.store.verify import verify_store
from openrlhf_bd.store.writer import StoreWriter

__all__ = [
    "StoreManifest",
    "StoreReader",
    "StoreSummary",
    "StoreWriter",
    "incomplete_share",
    "one_token_share",
    "summary",
    "verify_store",
]
