"""Rows from local files, globs and hub datasets, each with where it came from.

Reading never judges what a row means; it only says which rows could not be read.
"""

from __future__ import annotations

import csv
import glob
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_sft.errors import DataError
from mamba_sft.json_lines import BOM, Row, read_json_lines
from mamba_sft.model.checkpoint import is_hub_id
from mamba_sft.model.checksums import file_checksum
from mamba_sft.recipe.builtin import find_path

if TYPE_CHECKING:
    from mamba_sft.recipe.fields import SourceSection

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_BATCH = 1000


def read_source(source: SourceSection) -> Iterator[Row]:
    """Yields the rows of a source, at most `source.limit`: files sorted by name, rows as they stand.

    Raises:
        DataError: Nothing is there, it is no kind of file we read, it is damaged as a whole, or it is empty.
    """
    return islice(chain.from_iterable(_not_empty(name, rows) for name, rows in _open(source)), source.limit)


def identity(source: SourceSection) -> dict[str, str]:
    """Returns what tells one content of a source from another: digests of its files, or the hub's commit.

    Raises:
        DataError: Nothing is there.
    """
    found = find_path(source.path)
    if glob.has_magic(source.path) and not found.exists():
        files = _matches(source.path, found)
    elif found.is_file():
        files = [found]
    elif found.is_dir():
        files = sorted(path for path in found.rglob("*") if path.is_file())
    elif is_hub_dataset(source.path):
        return {source.path: _hub_commit(source)}
    else:
        raise _missing(found)
    try:
        return {str(path): file_checksum(path) for path in files}
    except OSError as error:
        raise DataError(f"cannot read `{error.filename}`: {error.strerror or error}") from error


def _hub_commit(source: SourceSection) -> str:
    from datasets import load_dataset_builder

    with _hub_errors(source.path):
        return str(load_dataset_builder(source.path, source.name).hash)


def is_hub_dataset(path: str) -> bool:
    """Returns whether a source's path means a data set on the hub, and no file, directory or glob here."""
    found = find_path(path)
    return is_hub_id(path) and found.suffix.lower() not in _READERS and not found.exists()


def _open(source: SourceSection) -> Iterator[tuple[str, Iterator[Row]]]:
    found = find_path(source.path)
    if glob.has_magic(source.path) and not found.exists():
        for path in _matches(source.path, found):
            yield str(path), _read_file(path)
    elif found.is_file():
        yield str(found), _read_file(found)
    elif found.is_dir():
        yield str(found), _read_hub(source, str(found))
    elif is_hub_dataset(source.path):
        yield source.path, _read_hub(source, source.path)
    else:
        raise _missing(found)


def _matches(pattern: str, found: Path) -> list[Path]:
    paths = sorted(path for path in map(Path, glob.glob(str(found), recursive=True)) if path.is_file())
    if not paths:
        raise DataError(
            f"no file matches `{pattern}`",
            hint="globs start from the working directory; `**` crosses directories",
        )
    return paths


def _missing(path: Path) -> DataError:
    if not path.parent.is_dir():
        return DataError(f"no file `{path}`: there is no directory `{path.parent}`")
    names = [entry.name for entry in path.parent.iterdir()]
    close = get_close_matches(path.name, names, n=1)
    if close:
        return DataError(f"no file `{path}`", hint=f"did you mean `{path.with_name(close[0])}`?")
    readable = sorted(name for name in names if Path(name).suffix.lower() in _READERS)[:8]
    listing = (
        f"`{path.parent}` has {', '.join(readable)}" if readable else "paths start from the working directory"
    )
    return DataError(f"no file `{path}`", hint=listing)


def _not_empty(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise DataError(f"`{name}` holds no rows")
    yield first
    yield from rows


def _read_file(path: Path) -> Iterator[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"cannot read `{path}`", hint=f"data files end in {', '.join(_READERS)}")
    try:
        with path.open("rb") as file:
            start = file.read(4096)
        if start.startswith(_UTF16_MARKS):
            raise DataError(
                f"`{path}` is UTF-16", hint=f"iconv -f UTF-16 -t UTF-8 {path} > converted{path.suffix}"
            )
        yield from reader(path)
    except OSError as error:
        raise DataError(f"cannot read `{path}`: {error.strerror or error}") from error


def _read_json(path: Path) -> Iterator[Row]:
    """One object a line, or one array of objects: what the file starts with decides, not its name."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(BOM).lstrip()
    return _read_array(path) if start.startswith(b"[") else _read_lines(path)


def _read_lines(path: Path) -> Iterator[Row]:
    for row in read_json_lines(path):
        yield row if row.problem else _row(row.file, row.where, row.value)


def _row(file: str, where: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(file, where, value)
    return Row(file, where, value, f"not an object but {type(value).__name__}")


def _read_array(path: Path) -> Iterator[Row]:
    data = path.read_bytes().removeprefix(BOM)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8: byte 0x{data[error.start]:02x}") from error
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    position, line = text.index("[") + 1, text.count("\n", 0, text.index("[")) + 1
    while True:
        start = space.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", position, start)
        if text.startswith("]", start):
            return
        try:
            value, position = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}, column {error.colno}") from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}:{line}: not readable as JSON: {error}") from error
        yield _row(str(path), f"{path}:{line}", value)
        line += text.count("\n", start, position)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 128 KiB, is shorter than a long answer
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
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
        return Row(file, where, shown, "not UTF-8")
    return Row(file, where, dict(zip(header, fields, strict=True)))


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(_BATCH):
            for value in batch.to_pylist():
                number += 1
                yield Row(str(path), f"{path}: row {number}", without_nulls(value))
    except pa.ArrowException as error:
        raise DataError(f"`{path}` is not a readable parquet file: {error}") from error


def _read_hub(source: SourceSection, path: str) -> Iterator[Row]:
    from datasets import load_dataset

    with _hub_errors(path):
        dataset = load_dataset(path, source.name, split=source.split, streaming=source.stream)
    number = 0
    for batch in dataset.iter(_BATCH):
        for values in zip(*batch.values(), strict=True):
            number += 1
            value = without_nulls(dict(zip(batch, values, strict=True)))
            yield Row(path, f"{path} ({source.split}): row {number}", value)


@contextmanager
def _hub_errors(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # datasets, huggingface_hub, fsspec and httpx each raise their own kinds
        raise DataError(
            f"cannot load the dataset `{path}`: {type(error).__name__}: {str(error).strip()}",
            hint="`path` is a hub id, a file or a glob; `name` picks a configuration, `split` a split;"
            " private datasets need `hf auth login`",
        ) from error


def without_nulls(value: Any) -> Any:
    """`value` without keys that hold null, at any depth: Arrow fills every key any row has."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
