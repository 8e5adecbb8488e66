"""One reader for each kind of file: rows, each with its file and line. All but parquet may be packed."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mamba_sft import json_lines
from mamba_sft.data.json_files import from_latin, read_json
from mamba_sft.errors import DataError
from mamba_sft.json_lines import (
    TOO_DEEP,
    Row,
    is_too_deep,
    numbered_lines,
    pandas_command,
    refuse_too_long,
)
from mamba_sft.packed_files import open_bytes

_BATCH = 1000


def _read_text(path: Path) -> Iterator[Row]:
    """Paragraphs: what stands between blank lines is a text."""
    paragraph: list[bytes] = []
    start, length = 1, 0
    for number, line in numbered_lines(path):
        if line.strip():
            start, length = (start, length + len(line)) if paragraph else (number, len(line))
            refuse_too_long(path, start, length)
            paragraph.append(line)
        elif paragraph:
            yield _text(path, start, paragraph)
            paragraph = []
    if paragraph:
        yield _text(path, start, paragraph)


def _read_text_lines(path: Path) -> Iterator[Row]:
    return (_text(path, number, [line]) for number, line in numbered_lines(path) if line.strip())


def _read_document(path: Path) -> Iterator[Row]:
    lines, length = [], 0
    for _, line in numbered_lines(path):
        length += len(line)
        refuse_too_long(path, 1, length)
        lines.append(line)
    if any(line.strip() for line in lines):
        yield _text(path, 1, lines)


TEXT_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "line": _read_text_lines,
    "paragraph": _read_text,
    "document": _read_document,
}
"""How a text file is read, by `sample_by`."""


def _text(path: Path, line: int, lines: list[bytes]) -> Row:
    where, text = f"{path}:{line}", b"".join(lines).replace(b"\r\n", b"\n").strip(b"\n")
    try:
        return Row(str(path), where, {"text": text.decode("utf-8")})
    except UnicodeDecodeError as error:
        shown = text.decode("utf-8", "backslashreplace")
        return Row(str(path), where, shown, f"not UTF-8: byte 0x{text[error.start]:02x}; {from_latin(path)}")


def _read_csv(path: Path) -> Iterator[Row]:
    return _read_table(path, ",")


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_table(path, "\t")


def _read_table(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 128 KiB, is shorter than a long answer
    with (
        open_bytes(path) as packed,
        io.TextIOWrapper(packed, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        lines = _RowLines(path, file)
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        header: list[str] = []
        line = 1
        try:
            for fields in reader:
                lines.start, lines.length = reader.line_num + 1, 0
                if fields and not header:
                    header = _checked_header(path, line, fields, delimiter)
                elif fields:
                    yield _parse_fields(f"{path}:{line}", str(path), header, fields)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not CSV: {error}") from error


class _RowLines:
    """The lines of a table, as long as a row of them does not become too long: a quoted one has many.

    Attributes:
        start: The line that the row begins with.
        length: Characters of the row so far.
    """

    def __init__(self, path: Path, file: io.TextIOWrapper):
        self.start, self.length = 1, 0
        self._path, self._file = path, file

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(json_lines.LONGEST + 1):
            self.length += len(line)
            refuse_too_long(self._path, self.start, self.length)
            yield line


def _checked_header(path: Path, line: int, fields: list[str], delimiter: str) -> list[str]:
    if not _is_utf8(fields):
        raise DataError(f"{path}:{line}: the header is not UTF-8", hint=from_latin(path))
    if len(set(fields)) < len(fields) or not all(fields):
        raise DataError(f"{path}:{line}: the header names a column twice or not at all: {', '.join(fields)}")
    wanted = "tabs" if delimiter == "\t" else "commas"
    for other, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (",", "commas")):
        if len(fields) == 1 and other in fields[0]:
            raise DataError(
                f"{path}:{line}: the columns are separated by {name}, not {wanted}",
                hint=pandas_command(path, "read_csv", sep=other),
            )
    return fields


def _parse_fields(where: str, file: str, header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        return Row(file, where, fields, f"{len(fields)} fields where the header has {len(header)}")
    if not _is_utf8(fields):
        shown = [
            field.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for field in fields
        ]
        return Row(file, where, shown, f"not UTF-8; {from_latin(Path(file))}")
    return Row(file, where, dict(zip(header, fields, strict=True)))


def _is_utf8(fields: list[str]) -> bool:
    """Whether fields that were read with `surrogateescape` were UTF-8."""
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for value, problem in _values(batch):
                    number += 1
                    yield Row(str(path), f"{path}: row {number}", value, problem)
    except (pa.ArrowException, ValueError, OverflowError, MemoryError) as error:
        raise DataError(f"`{path}` is not a readable parquet file: {error}") from error


def _values(batch: Any) -> Iterator[tuple[Any, str | None]]:
    """The rows of an Arrow batch; one that Python cannot hold (a date in the year 300,000) has a problem."""
    try:
        values = batch.to_pylist()
    except Exception:  # a class of its own for each type: numbers, dates, time zones, texts, extensions
        values = None
    for number in range(batch.num_rows):
        try:
            value = values[number] if values is not None else batch.slice(number, 1).to_pylist()[0]
        except Exception as error:
            yield f"row {number + 1} of its batch", f"Python cannot hold a value of it: {error}"
            continue
        if is_too_deep(value):
            yield f"row {number + 1} of its batch", TOO_DEEP
        else:
            yield without_nulls(value), None


def without_nulls(value: Any) -> Any:
    """`value` without keys that hold null, at any depth: Arrow fills every key any row has."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
"""How each kind of file is read, by its ending; `.txt` is one of `TEXT_READERS`."""
KINDS = (*READERS, ".txt")
"""The endings of files that are read."""
