"""JSON Lines, read in one way wherever a user hands such a file over: data, prompts, chats.

A byte order mark is skipped, a line ends at a line feed and nowhere else (U+2028 is text), blank lines count
but say nothing, and what is wrong with a line is told with its file, line and column.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_sft.packed_files import open_bytes

BOM = b"\xef\xbb\xbf"


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


def read_json_lines(path: Path) -> Iterator[Row]:
    """Yields every line that is not blank; one that is not JSON has a `problem`.

    Raises:
        OSError: The file cannot be read.
    """
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(BOM) if number == 1 else line
            if text.strip():
                yield _parse(str(path), f"{path}:{number}", text)


def _parse(file: str, where: str, line: bytes) -> Row:
    try:
        return Row(file, where, json.loads(line.decode("utf-8").rstrip("\r\n")))
    except UnicodeDecodeError as error:
        shown = line.decode("utf-8", errors="backslashreplace").strip()
        return Row(file, where, shown, f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start + 1}")
    except json.JSONDecodeError as error:
        return Row(file, where, line.decode("utf-8").strip(), f"not JSON: {error.msg}, column {error.colno}")
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
        return Row(file, where, line.decode("utf-8").strip()[:1000], f"not readable as JSON: {error}")
