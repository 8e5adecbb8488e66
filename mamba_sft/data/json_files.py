"""Rows of a JSON file, by what is in it, not by its name.

One object a line; one array or several behind each other; objects over many lines; one object around a list
of rows. No more than one row of them is in memory at a time.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from mamba_sft.data.columns import NAMES
from mamba_sft.data.json_text import JsonText, JsonTextError
from mamba_sft.data.roles import ROLES, fold_role
from mamba_sft.data.turns import ROLE_KEYS, looks_like_turns
from mamba_sft.data.values import kind_of
from mamba_sft.errors import DataError
from mamba_sft.json_lines import (
    BOM,
    TOO_DEEP,
    Row,
    is_too_deep,
    pandas_command,
    python_command,
    python_text,
    read_json_lines,
    refuse_too_long,
)
from mamba_sft.packed_files import open_bytes

_LINE = 1 << 20
"""Bytes of the first line that are looked at: a file in one line is longer, a row of JSON Lines is not."""

_KEYS = 1_000_000
"""Keys of the first object that are looked at."""


def read_json(path: Path) -> Iterator[Row]:
    """Yields the rows of a file that holds JSON.

    Raises:
        DataError: It is not JSON as a whole, or holds no rows.
        OSError: It cannot be read.
    """
    with open_bytes(path) as file:
        lines = (line.removeprefix(BOM) for line in iter(lambda: file.readline(_LINE), b""))
        first, second = islice(chain((line for line in lines if line.strip()), repeat(b"")), 2)
    if second and _is_line(first):
        return _read_lines(path)
    if first.lstrip().startswith(b"["):
        return _in_file(path, _read_arrays)
    if first.lstrip().startswith(b"{"):
        return _read_objects(path, second)
    return _read_lines(path)


def from_latin(path: Path) -> str:
    """Returns the command for a file that is not UTF-8."""
    old, new = shlex.quote(str(path)), shlex.quote(f"utf8-{path.name}")
    return f"if it is latin-1, as older programs write: iconv -f LATIN1 -t UTF-8 {old} > {new}"


def _is_line(line: bytes) -> bool:
    """Whether a line is a row by itself: an object, or a list of turns."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or _is_chat(value)


def _is_chat(value: Any) -> bool:
    """Whether a value is a chat without a name for it: a list of turns, the first by someone we know."""
    return isinstance(value, list) and looks_like_turns(value) and _is_turn(value[0])


def _is_turn(value: Any) -> bool:
    role = next((value[key] for key in ROLE_KEYS if key in value), None) if isinstance(value, dict) else None
    return isinstance(role, str) and fold_role(role) in ROLES and looks_like_turns([value])


def _row(path: Path, where: str, value: Any) -> Row:
    if is_too_deep(value):
        return Row(str(path), where, f"{kind_of(value)} that is too deep to be shown", TOO_DEEP)
    if _is_chat(value):
        return Row(str(path), where, {"messages": value})
    if isinstance(value, dict):
        return Row(str(path), where, value)
    return Row(str(path), where, value, f"not an object but {kind_of(value)}")


def _read_lines(path: Path) -> Iterator[Row]:
    for row in read_json_lines(path):
        yield row if row.problem else _row(path, row.where, row.value)


def _in_file(path: Path, read: Callable[[Path, JsonText], Iterator[Row]]) -> Iterator[Row]:
    """Rows of a file that is one JSON text; what is wrong with it is told with its line."""
    with open_bytes(path) as file:
        try:
            yield from read(path, JsonText(file))
        except JsonTextError as error:
            raise _not_json(path, error) from error


def _not_json(path: Path, error: JsonTextError) -> DataError:
    refuse_too_long(path, error.line, error.length)
    return DataError(f"{path}:{error.line}: {error}", hint=from_latin(path) if error.not_utf8 else None)


def _read_arrays(path: Path, text: JsonText) -> Iterator[Row]:
    """One array of rows, or several behind each other; an array of turns is one row."""
    while text.next():
        if text.next() != "[":
            raise DataError(
                f"{path}:{text.line}: something stands behind the array: {text.rest(40)!r}",
                hint="a file holds one array, several arrays, or one object a line",
            )
        line, items = text.line, _entries(path, text)
        where, first = next(items, ("", None))
        if _is_turn(first):
            turns = [first, *(value for _, value in items)]
            yield _row(path, f"{path}:{line}", turns)
        elif where:
            yield _row(path, where, first)
            yield from (_row(path, where, value) for where, value in items)
        text.take(",")


def _entries(path: Path, text: JsonText) -> Iterator[tuple[str, Any]]:
    """Where each entry of an array stands, and the entry."""
    return _placed(path, text.items())


def _placed(path: Path, values: Iterable[tuple[int, Any]]) -> Iterator[tuple[str, Any]]:
    """A place of its own for each of some values with their lines: many may stand in one line."""
    before = 0
    for number, (line, value) in enumerate(values, start=1):
        yield f"{path}:{line}" + (f", entry {number}" if line == before else ""), value
        before = line


def _read_objects(path: Path, second_line: bytes) -> Iterator[Row]:
    """Objects over many lines, or one around a list of rows; else lines, of which the first is broken."""
    try:
        shape = _Shape.of(path)
    except JsonTextError as error:
        if error.length or (error.line > 1 and not _is_line(second_line)):
            raise _not_json(path, error) from error
        return _read_lines(path)
    if shape.alone:
        shape.refuse_table(path)
        if not NAMES & set(shape.keys):  # else it is a row, which may hold a list of objects
            shape.refuse_several(path)
            if shape.lists:
                return _in_file(path, partial(_read_wrapped, key=shape.lists[0]))
    return _in_file(path, _read_values)


def _read_wrapped(path: Path, text: JsonText, key: str) -> Iterator[Row]:
    for found in text.object_keys():
        if found == key:
            yield from (_row(path, where, value) for where, value in _entries(path, text))
        else:
            text.value()


def _read_values(path: Path, text: JsonText) -> Iterator[Row]:
    return (_row(path, where, value) for where, value in _placed(path, _values(text)))


def _values(text: JsonText) -> Iterator[tuple[int, Any]]:
    while text.next():
        line = text.line
        yield line, text.value()
        text.take(",")


@dataclass
class _Shape:
    """What the first object of a file holds, and whether it is alone in the file."""

    keys: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    """Keys of lists of objects."""
    columns: int = 0
    """Keys of objects of row numbers, as pandas writes a column."""
    numbered: int = 0
    """Keys that are row numbers and hold an object, as pandas writes a row."""
    alone: bool = True

    @classmethod
    def of(cls, path: Path) -> _Shape:
        """Looks through the first object.

        Raises:
            JsonTextError: It is not JSON.
        """
        found = cls()
        with open_bytes(path) as file:
            text = JsonText(file)
            for number, key in enumerate(islice(text.object_keys(), _KEYS)):
                found.keys.append(key)
                if text.next() == "[":
                    kinds = {isinstance(item, dict) for _, item in text.items()}
                    found.lists += [key] if kinds == {True} else []
                    continue
                value = text.value()
                if isinstance(value, dict) and value:
                    found.columns += list(value) == [str(row) for row in range(len(value))]
                    found.numbered += key == str(number)
            text.take(",")
            found.alone = len(found.keys) == _KEYS or not text.next()
        return found

    def refuse_table(self, path: Path) -> None:
        """Refuses a table as pandas writes one.

        Raises:
            DataError: It is one.
        """
        keys, orient = set(self.keys), None
        if keys and self.columns == len(keys):
            orient = "columns"
        elif keys and self.numbered == len(keys):
            orient = "index"
        elif {"columns", "data"} <= keys <= {"columns", "data", "index"} and not self.lists:
            orient = "split"
        if orient:
            how = {} if orient == "columns" else {"orient": orient}
            raise DataError(
                f"`{path}` holds columns, not rows: it is what pandas writes"
                + (f" with `orient='{orient}'`" if how else " by default"),
                hint="`df.to_json('data.jsonl', orient='records', lines=True)`, or "
                + pandas_command(path, "read_json", **how),
            )

    def refuse_several(self, path: Path) -> None:
        """Refuses several lists of rows in one object.

        Raises:
            DataError: There are several.
        """
        if len(self.lists) > 1:
            old, one = python_text(path), python_text(self.lists[0])
            new = python_text(f"{path.stem}-1.json")
            command = python_command(
                f'import json; rows = json.load(open({old}, encoding="utf-8-sig"))[{one}];'
                f' json.dump(rows, open({new}, "w"))'
            )
            raise DataError(
                f"`{path}` holds several lists of rows: {', '.join(f'`{key}`' for key in self.lists)}",
                hint=f"one list a file: {command}",
            )
