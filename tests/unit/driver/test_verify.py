"""Rows of an earlier run are compared with what was sealed, and who waits for it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from openrlhf_bd.driver import verify
from openrlhf_bd.driver.verify import verify_rows
from openrlhf_bd.errors import StoreError
from openrlhf_bd.store import StoreWriter
from tests.unit.store.rows import teacher_manifest, teacher_rows


def test_a_large_store_says_that_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a size on, the wait has a line with what is read and how much; below it nothing is said."""
    with StoreWriter(tmp_path, teacher_manifest(), rows_per_shard=4) as writer:
        writer.append(teacher_rows())
    num_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))
    verify_rows(tmp_path)
    assert not capsys.readouterr().out
    monkeypatch.setattr(verify, "_SAID_FROM_BYTES", num_bytes)
    verify_rows(tmp_path)
    printed = capsys.readouterr().out
    assert f"reading all {num_bytes / 1000:.0f} kB of {tmp_path}" in printed
    assert "check rows: 5/5 shards" in printed
    (tmp_path / "shard-00002.parquet").write_bytes(b"")
    with pytest.raises(StoreError, match=r"shard-00002\.parquet: 0 bytes"):
        verify_rows(tmp_path)
