"""One reader for each kind of file: rows, each with its file and line.

JSON is read by what is in it, not by its name: one object a line, one array or several, one object over many
lines, one object around a list of rows. Every kind but parquet may be packed with gzip.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mamba_sft.data.columns import NAMES
from mamba_sft.errors import DataError
from mamba_sft.json_lines import BOM, Row, open_bytes, read_json_lines

_BATCH = 1000
_AS_LINES = (
    "python -c \"import pandas; pandas.{read}('{path}'{how}).to_json('{name}.jsonl',"
    " orient='records', lines=True, force_ascii=False)\""
)
"""The command that writes a table anew as one object a line."""


def kind_of_file(path: Path) -> str:
    """Returns the ending that says how a file is read: `.jsonl` of `chats.jsonl.gz`."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _read_json(path: Path) -> Iterator[Row]:
    """What the file starts with decides, not its name."""
    with open_bytes(path) as file:
        first = next((line for line in file if line.removeprefix(BOM).strip()), b"")
        more = any(line.strip() for line in file)
    start = first.removeprefix(BOM).lstrip()
    if start.startswith(b"["):
        return _read_arrays(path)
    if start.startswith(b"{") and not (more and _is_json(start)):
        return _read_object(path)
    return _read_lines(path)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_object(path: Path) -> Iterator[Row]:
    """One object: over many lines, or around a list of rows; else lines, of which the first is broken."""
    with open_bytes(path) as file:
        data = file.read().removeprefix(BOM)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        yield from _read_lines(path)
        return
    lists = [key for key, rows in value.items() if _is_rows(rows)]
    if len(lists) == 1 and not NAMES & set(value):  # else it is a row, which may hold a list of objects
        for number, row in enumerate(value[lists[0]], start=1):
            yield _row(str(path), f"{path}: `{lists[0]}` {number}", row)
        return
    if value and all(map(_is_column, value.values())):
        raise DataError(
            f"`{path}` holds columns, not rows: it is what pandas writes by default",
            hint="`df.to_json('data.jsonl', orient='records', lines=True)`, or "
            + _AS_LINES.format(read="read_json", path=path, how="", name=path.stem),
        )
    yield _row(str(path), f"{path}:1", value)


def _is_column(value: Any) -> bool:
    """Whether it is a column as pandas writes one: an object of row numbers."""
    return isinstance(value, dict) and list(value) == [str(row) for row in range(len(value))] and bool(value)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _read_lines(path: Path) -> Iterator[Row]:
    for row in read_json_lines(path):
        yield row if row.problem else _row(row.file, row.where, row.value)


def _row(file: str, where: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(file, where, value)
    return Row(file, where, value, f"not an object but {type(value).__name__}")


def _read_arrays(path: Path) -> Iterator[Row]:
    """One array of rows, or several behind each other."""
    with open_bytes(path) as file:
        data = file.read().removeprefix(BOM)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8: byte 0x{data[error.start]:02x}", hint=_from_latin(path)
        ) from error
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    position, line = text.index("[") + 1, text.count("\n", 0, text.index("[")) + 1
    while True:
        start = space.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", position, start)
        if text.startswith("]", start):
            position = space.match(text, start + 1).end()  # type: ignore[union-attr]
            line += text.count("\n", start, position)
            if position == len(text):
                return
            if not text.startswith("[", position):
                raise DataError(
                    f"{path}:{line}: something stands behind the array: {text[position : position + 40]!r}",
                    hint="a file holds one array, several arrays, or one object a line",
                )
            position += 1
            continue
        try:
            value, position = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}, column {error.colno}") from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}:{line}: not readable as JSON: {error}") from error
        yield _row(str(path), f"{path}:{line}", value)
        line += text.count("\n", start, position)


def _from_latin(path: Path) -> str:
    return f"if it is latin-1, as older programs write: iconv -f LATIN1 -t UTF-8 {path} > utf8-{path.name}"


def _read_text(path: Path) -> Iterator[Row]:
    """Paragraphs: what stands between blank lines is a text."""
    with open_bytes(path) as file:
        paragraph: list[bytes] = []
        start = 1
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(BOM) if number == 1 else line
            if text.strip():
                start = start if paragraph else number
                paragraph.append(text)
            elif paragraph:
                yield _paragraph(path, start, paragraph)
                paragraph = []
        if paragraph:
            yield _paragraph(path, start, paragraph)


def _paragraph(path: Path, line: int, lines: list[bytes]) -> Row:
    where, text = f"{path}:{line}", b"".join(lines).replace(b"\r\n", b"\n").strip(b"\n")
    try:
        return Row(str(path), where, {"text": text.decode("utf-8")})
    except UnicodeDecodeError as error:
        shown = text.decode("utf-8", "backslashreplace")
        return Row(str(path), where, shown, f"not UTF-8: byte 0x{text[error.start]:02x}; {_from_latin(path)}")


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
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        header: list[str] = []
        line = 1
        try:
            for fields in reader:
                if fields and not header:
                    header = _checked_header(path, line, fields)
                elif fields:
                    yield _parse_fields(f"{path}:{line}", str(path), header, fields)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not CSV: {error}") from error


def _checked_header(path: Path, line: int, fields: list[str]) -> list[str]:
    if len(set(fields)) < len(fields) or not all(fields):
        raise DataError(f"{path}:{line}: the header names a column twice or not at all: {', '.join(fields)}")
    for delimiter, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(fields) == 1 and delimiter in fields[0]:
            how = f", sep={delimiter!r}"
            raise DataError(
                f"{path}:{line}: the columns are separated by {name}, not commas",
                hint=_AS_LINES.format(read="read_csv", path=path, how=how, name=path.stem),
            )
    return fields


def _parse_fields(where: str, file: str, header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        return Row(file, where, fields, f"{len(fields)} fields where the header has {len(header)}")
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError:
        shown = [
            field.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for field in fields
        ]
        return Row(file, where, shown, f"not UTF-8; {_from_latin(Path(file))}")
    return Row(file, where, dict(zip(header, fields, strict=True)))


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(_BATCH):
            for value, problem in _values(batch):
                number += 1
                yield Row(str(path), f"{path}: row {number}", without_nulls(value), problem)
    except pa.ArrowException as error:
        raise DataError(f"`{path}` is not a readable parquet file: {error}") from error


def _values(batch: Any) -> Iterator[tuple[Any, str | None]]:
    """The rows of an Arrow batch; one that Python cannot hold (a date in the year 300,000) has a problem."""
    try:
        yield from ((value, None) for value in batch.to_pylist())
        return
    except (OverflowError, ValueError):
        pass
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        try:
            yield row.to_pylist()[0], None
        except (OverflowError, ValueError) as error:
            yield f"a row of {', '.join(batch.schema.names)}", f"Python cannot hold a value of it: {error}"


def without_nulls(value: Any) -> Any:
    """`value` without keys that hold null, at any depth: Arrow fills every key any row has."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
"""How each kind of file is read, by its ending."""
