"""A writer process that ends without any clean-up, when a file is about to get its name, or right after.

python dying_writer.py FOLDER FILE before|after     (FILE "none": when the writer has just been opened)
"""

import os
import sys
from pathlib import Path

from rows import teacher_manifest, teacher_rows

from openrlhf_bd.store import StoreWriter

EXIT_AT_FAULT = 91


def main(folder: Path, fatal_name: str, moment: str) -> None:
    """Write 20 rows in shards of 6; die at the second shard, or at the manifest that lists it."""
    replace = os.replace

    def dying_replace(source: Path, target: Path) -> None:
        lists_one_shard_already = (folder / "shard-00001.parquet").exists()
        fatal = target.name == fatal_name and (fatal_name != "manifest.json" or lists_one_shard_already)
        if fatal and moment == "before":
            os._exit(EXIT_AT_FAULT)
        replace(source, target)
        if fatal:
            os._exit(EXIT_AT_FAULT)

    os.replace = dying_replace
    writer = StoreWriter(folder, teacher_manifest(), rows_per_shard=6)
    if fatal_name == "none":
        os._exit(EXIT_AT_FAULT)
    for row in teacher_rows():
        writer.append([row])
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
