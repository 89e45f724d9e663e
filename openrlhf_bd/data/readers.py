"""One reader a file type. Each knows its number of records, yields them with `file:line`, and can be read again."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openrlhf_bd.errors import DataError

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a data set.

    Attributes:
        values: as the file has them.
        where: `file:line`, or `file: record i`.
    """

    values: dict[str, Any]
    where: str


class JsonLinesReader:
    """A JSON object a line; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _opened(path) as file:
            self._length = sum(1 for line in file if line.strip())

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Record]:
        with _opened(self._path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{self._path}:{number}"
                    yield _object(_parse_json(line, where), where)

    def fingerprint(self) -> str:
        return _hash_file(self._path)


class JsonReader:
    """A JSON array of objects. Held in memory, so large data sets are better as JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _opened(path) as file:
            self._records = list(self._parse(_decode(file.read(), str(path))))

    def _parse(self, text: str) -> Iterator[Record]:
        decoder = json.JSONDecoder()
        position, line, seen = _skip_space(text, text.index("[") + 1), 1, 0
        while not text.startswith("]", position):
            line, seen = line + text.count("\n", seen, position), position
            where = f"{self._path}:{line}"
            try:
                value, position = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                raise DataError(f"{self._path}:{error.lineno}: is not JSON: {error.msg}; correct the file") from None
            yield _object(value, where)
            position = _skip_space(text, position)
            if text.startswith(",", position):
                position = _skip_space(text, position + 1)
            elif not text.startswith("]", position):
                raise DataError(f"{where}: found no comma or closing bracket after this record; correct the file")

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def fingerprint(self) -> str:
        return _hash_file(self._path)


class CsvReader:
    """CSV with a header line; every value is text."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._length = sum(1 for _ in self)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Record]:
        with _opened(self._path) as raw:
            file = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
            rows = csv.DictReader(file, strict=True)
            line = 1
            try:
                for row in rows:
                    where = f"{self._path}:{line + 1}"
                    line = rows.line_num
                    if None in row or None in row.values():
                        raise DataError(f"{where}: has not as many values as the header line; quote values with commas")
                    yield Record(row, where)
            except csv.Error as error:
                raise DataError(f"{self._path}:{rows.line_num}: is not CSV: {error}; correct the file") from None
            except UnicodeDecodeError as error:
                raise DataError(f"{self._path}: is not UTF-8 text after line {line}: {error.reason}") from None

    def fingerprint(self) -> str:
        return _hash_file(self._path)


class ParquetReader:
    """A Parquet file, read a few thousand rows at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with pq.ParquetFile(path) as file:
                self._length = file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as a Parquet file: {error}") from error

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Record]:
        index = 0
        try:
            with pq.ParquetFile(self._path) as file:
                for batch in file.iter_batches(batch_size=4096):
                    for values in batch.to_pylist():
                        yield Record(values, f"{self._path}: record {index}")
                        index += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._path}: is damaged after record {index - 1}: {error}") from error

    def fingerprint(self) -> str:
        return _hash_file(self._path)


class TableReader:
    """A `datasets.Dataset`, which maps its files into memory.

    Args:
        data: the data set.
        name: for messages.
    """

    def __init__(self, data: Any, name: str) -> None:
        self._data = data
        self._name = name

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Record]:
        for index, values in enumerate(self._data):
            yield Record(values, f"{self._name}: record {index}")

    def fingerprint(self) -> str:
        """Hash of name, size, columns, and first and last record: of a hub data set, not every byte is read."""
        ends = [self._data[index] for index in (0, -1)] if len(self._data) else []
        text = repr((self._name, len(self._data), self._data.column_names, ends))
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def open_json(path: Path) -> JsonReader | JsonLinesReader:
    """A `.json` file: an array of objects, or an object a line."""
    with _opened(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return JsonReader(path) if start.startswith(b"[") else JsonLinesReader(path)


def open_arrow(path: Path) -> TableReader:
    """An Arrow file or stream, mapped into memory."""
    from datasets import Dataset

    try:
        return TableReader(Dataset.from_file(str(path)), str(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as an Arrow file: {error}") from error


Reader = JsonLinesReader | JsonReader | CsvReader | ParquetReader | TableReader

READERS: dict[str, Callable[[Path], Reader]] = {
    ".jsonl": JsonLinesReader,
    ".json": open_json,
    ".csv": CsvReader,
    ".parquet": ParquetReader,
    ".arrow": open_arrow,
}


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}") from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from None


def _parse_json(line: bytes, where: str) -> Any:
    try:
        return json.loads(_decode(line, where))
    except (json.JSONDecodeError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: is not JSON: {reason}; expected one JSON object a line. Correct the line") from None


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: found a {type(value).__name__}, expected a JSON object with named values")
    return Record(value, where)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _hash_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with _opened(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
