"""JSON Lines, read in one way wherever a user hands such a file over: data, prompts, chats.

A byte order mark is skipped, a line ends at a line feed and nowhere else (U+2028 is text), blank lines count
but say nothing, and what is wrong with a line is told with its file, line and column.
"""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_sft.errors import DataError
from mamba_sft.other_files import other_file
from mamba_sft.packed_files import CANNOT_READ, is_packed, kind_of_file, open_bytes
from mamba_sft.wording import size_text

BOM = b"\xef\xbb\xbf"
DEEPEST = 100
"""Lists and objects within each other in a value that is taken: no data set needs as many, and what walks
through values, Python's own parser among them, ends in the middle of deeper ones."""
LONGEST = 256_000_000
"""Bytes or characters of a row that is taken: a packed file of some MB may unpack to a line of many GB."""
_HOW = 'one a line, as JSON: {"prompt": "What is a haiku?"}, or as they are in a file called .txt'
"""How prompts stand in a file."""
_TABLES = {
    ".csv": ("read_csv", {}), ".tsv": ("read_csv", {"sep": "\t"}), ".parquet": ("read_parquet", {}),
}  # fmt: skip
"""Endings of tables, the function of pandas that reads each, and its arguments."""
_LONGEST_SHOWN = 100_000
"""Characters of a line that is tried as a Python value."""
TOO_DEEP = f"nested too deeply, more than {DEEPEST} levels"


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Args:
        file: The file or hub dataset it is in; rows of one file have one format.
        where: The file with the line (`chats.jsonl:12`), or with the row where lines mean nothing.
        value: What the row holds, or its text as it stands where it could not be read.
        problem: Why it could not be read, or None.
    """

    file: str
    where: str
    value: Any
    problem: str | None = None


def parse_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: It is not JSON, has a number of thousands of digits, or is deeper than `DEEPEST`.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if is_too_deep(value):
        raise ValueError(TOO_DEEP)
    return value


def is_too_deep(value: Any) -> bool:
    """Returns whether lists and objects are nested more than `DEEPEST` deep."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            entry
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for entry in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(entry, dict | list | tuple)
        ]
        if not level:
            return False
    return True


def read_json_lines(path: Path) -> Iterator[Row]:
    """Yields every line that is not blank; one that is not JSON has a `problem`.

    Raises:
        DataError: A line is longer than `LONGEST`.
        OSError: The file cannot be read.
    """
    for number, line in numbered_lines(path):
        if line.strip():
            yield _parse(str(path), f"{path}:{number}", line)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields number and bytes of each line, the blank ones too, without a byte order mark.

    Raises:
        DataError: A line is longer than `LONGEST`.
        OSError: The file cannot be read.
    """
    with open_bytes(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=1):
            refuse_too_long(path, number, len(line))
            yield number, line.removeprefix(BOM) if number == 1 else line


def refuse_too_long(path: Path, line: int, length: int) -> None:
    """Refuses a file in which a row is longer than `LONGEST`.

    Args:
        path: The file.
        line: Where the row begins.
        length: What was read of it.

    Raises:
        DataError: It is.
    """
    if length > LONGEST:
        packed = f"; `{path.name}` itself has {size_text(path.stat().st_size)}" if is_packed(path) else ""
        raise DataError(
            f"{path}:{line}: a row of more than {size_text(LONGEST)}{packed}",
            hint="a row is one chat or one text; does the file hold what its name says, with line ends?",
        )


def read_prompt_file(path: Path, kind: str = "prompts", hint: str | None = None) -> list[Row]:
    """Returns the rows of a file of prompts: JSON Lines, or a txt file with one prompt a line.

    Args:
        path: The file.
        kind: What it is called where it cannot be read.
        hint: Who named it, for the same message.

    Raises:
        DataError: It cannot be read, a line of it cannot, or it holds no prompts.
    """
    ending = kind_of_file(path)
    if other := other_file(path):
        raise DataError(f"`{path}` is {other.what}", hint=other.hint)
    if ending in _TABLES and path.exists():
        read, how = _TABLES[ending]
        command = pandas_command(path, read, **how)
        raise DataError(f"`{path}` is a table, and {kind} are JSON Lines", hint=command)
    read_rows = _text_prompts if ending == ".txt" else read_json_lines
    try:
        rows = list(read_rows(path))
    except CANNOT_READ as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read the {kind} `{path}`: {reason}", hint=hint) from error
    if not rows:
        raise DataError(f"`{path}` holds no prompts", hint=_HOW)
    first = rows[0]
    if problem := _other_file(path, first):
        raise problem
    if isinstance(first.value, list) or (first.problem and str(first.value).startswith("[")):
        command = pandas_command(path, "read_json")
        raise DataError(f"{first.where}: an array, where one prompt a line is needed", hint=command)
    for row in rows:
        if row.problem is not None:
            raise DataError(f"{row.where}: {row.problem}", hint=_HOW)
    return rows


def _other_file(path: Path, first: Row) -> DataError | None:
    """What is wrong with a file that holds something else than its name says; None if nothing is."""
    if kind_of_file(path) == ".txt" and first.problem is None and _is_prompt(first.value["prompt"]):
        return DataError(
            f"{first.where}: JSON, and each line of a .txt is a prompt as it stands",
            hint=_renamed(path, ".jsonl"),
        )
    text = str(first.value).lstrip()
    if first.problem and first.problem.startswith("not JSON") and not text.startswith(("{", "[", '"')):
        return DataError(
            f"{first.where}: plain text, which only a file called .txt holds; prompts are JSON Lines",
            hint=_renamed(path, ".txt"),
        )
    return None


def _is_prompt(text: str) -> bool:
    try:
        value = parse_json(text)
    except ValueError:
        return False
    return isinstance(value, dict) and bool({"prompt", "messages"} & set(value))


def _renamed(path: Path, ending: str) -> str:
    """The command that gives a file the ending of what it holds; a packed one stays packed."""
    packed = path.suffix if is_packed(path) else ""
    stem = Path(path.name.removesuffix(packed)).stem
    return shlex.join(["mv", str(path), str(path.with_name(stem + ending + packed))])


def python_command(code: str) -> str:
    """Returns the command that runs a line of Python, as a shell takes it."""
    return f"python -c {shlex.quote(code)}"


def python_text(text: str | Path) -> str:
    """Returns a text as a line of Python has it, in double quotes: the shell's around it are single."""
    return json.dumps(str(text), ensure_ascii=False)


def pandas_command(path: Path, read: str, **how: str) -> str:
    """Returns the command that writes a table anew as JSON Lines, into the working directory.

    Args:
        path: The table, or a JSON array.
        read: The function of pandas that reads it.
        how: More arguments of that.
    """
    arguments = ", ".join([python_text(path), *(f"{name}={python_text(text)}" for name, text in how.items())])
    written = Path(f"{path.stem}.jsonl")
    if written.exists() and path.exists() and written.samefile(path):  # it would be written over
        written = Path(f"{path.stem}-lines.jsonl")
    return python_command(
        f"import pandas; pandas.{read}({arguments})"
        f'.to_json({python_text(written)}, orient="records", lines=True, force_ascii=False)'
    )


def _text_prompts(path: Path) -> Iterator[Row]:
    for number, line in numbered_lines(path):
        text, where = line.strip(b"\r\n"), f"{path}:{number}"
        try:
            if text.strip():
                yield Row(str(path), where, {"prompt": text.decode("utf-8")})
        except UnicodeDecodeError as error:
            yield Row(str(path), where, repr(text), _not_utf8(text, error))


def _parse(file: str, where: str, line: bytes) -> Row:
    try:
        return Row(file, where, parse_json(line.decode("utf-8").rstrip("\r\n")))
    except UnicodeDecodeError as error:
        shown = line.decode("utf-8", errors="backslashreplace").strip()
        return Row(file, where, shown, _not_utf8(line, error))
    except json.JSONDecodeError as error:
        text = line.decode("utf-8").strip()
        return Row(file, where, text, _not_json(text, error))
    except ValueError as error:
        reason = str(error).partition("; use sys.")[0]  # advice for programs
        return Row(file, where, line.decode("utf-8").strip()[:1000], f"not readable as JSON: {reason}")


def _not_json(text: str, error: json.JSONDecodeError) -> str:
    """Why a line is not JSON; for what Python prints of its own values, how JSON is made of it."""
    if len(text) <= _LONGEST_SHOWN and text[:1] in "{[" and "'" in text[:3]:
        try:
            ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
        else:
            return "a Python value, not JSON: `json.dumps(row)` writes it, not `str(row)`"
    comma = error.pos if text.startswith(",", error.pos) else len(text[: error.pos].rstrip()) - 1
    closing = text[comma + 1 :].lstrip()[:1]
    if text[comma : comma + 1] == "," and closing and closing in "}]":
        return f"not JSON: a comma before `{closing}`, column {comma + 1}"
    return f"not JSON: {error.msg}, column {error.colno}"


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start + 1}"
