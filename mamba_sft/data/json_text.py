"""A JSON text read in blocks, value by value: a file of any length in the memory of its largest value.

Python's own parser wants the whole text. The libraries that read JSON in parts refuse NaN, which pandas
writes, and do not tell the line; so Python's parser is handed the text in parts here.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from mamba_sft import json_lines
from mamba_sft.json_lines import BOM

_BLOCK = 1 << 20
"""Bytes read at once; twice as many each time a value does not end within what was read."""
_SPACE = re.compile(r"[ \t\r\n]*")
_TAIL = 2
"""Characters behind a number that may belong to it once more is read: `1e-5` begins with the number 1."""
_NEARLY = 16
"""An error this close to the end of what was read may come of the end: `-Infinity` has nine characters."""


class JsonTextError(Exception):
    """What is wrong with a JSON text, and where; whether it is no UTF-8, and how long what is too long is."""

    def __init__(self, line: int, problem: str, *, not_utf8: bool = False, length: int = 0):
        super().__init__(problem)
        self.length = length
        self.line = line
        self.not_utf8 = not_utf8


class JsonText:
    """Reads a JSON text from the start to the end.

    Args:
        file: Its bytes, UTF-8.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._parse = json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 0  # of the first character of `_text`
        self._counted = (0, 1)  # the line of a place in `_text`, as far as it was counted
        self._take_next(BOM.decode())

    @property
    def line(self) -> int:
        """The line of the next character, from 1."""
        at, line = self._counted
        self._counted = (self._at, line + self._text.count("\n", at, self._at))
        return self._counted[1]

    def next(self) -> str:
        """Returns the next character that is no white space, without taking it; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read()

    def take(self, character: str) -> bool:
        """Takes the next character that is no white space if it is this one; returns whether it was."""
        return bool(self.next()) and self._take_next(character)

    def rest(self, characters: int) -> str:
        """Returns what comes next, to be shown."""
        self.next()
        while len(self._text) - self._at < characters and not self._ended:
            self._read()
        return self._text[self._at : self._at + characters]

    def value(self) -> Any:
        """Returns the next value, whole.

        Raises:
            JsonTextError: There is none, it is not JSON or too long for a row, or Python cannot hold it.
        """
        self.next()
        while True:
            try:
                value, end = self._parse.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEARLY
                if not cut or self._ended:
                    raise self._not_json(error) from error
            except (RecursionError, ValueError) as error:  # too deep, or a number of thousands of digits
                raise JsonTextError(self.line, f"not readable as JSON: {error}") from error
            else:
                if end - self._at > json_lines.LONGEST:
                    raise JsonTextError(self.line, "a value that is too long", length=end - self._at)
                if end + _TAIL < len(self._text) or self._ended:
                    self._at = end
                    return value
            self._read()

    def items(self) -> Iterator[tuple[int, Any]]:
        """Yields the line and the value of each entry of the array that comes next.

        Raises:
            JsonTextError: It is no array, or is not JSON.
        """
        self._want("[")
        if self.take("]"):
            return
        while True:
            self.next()
            yield self.line, self.value()
            if self.take("]"):
                return
            self._want(",")
            if self.take("]"):  # a comma behind the last entry, as people write by hand
                return

    def object_keys(self) -> Iterator[str]:
        """Yields the keys of the object that comes next; the caller reads the value of each.

        Raises:
            JsonTextError: It is no object, or is not JSON.
        """
        self._want("{")
        if self.take("}"):
            return
        while True:
            line, key = self.line, self.value()
            if not isinstance(key, str):
                raise JsonTextError(line, f"not JSON: a key is a text, not {key!r:.40}")
            self._want(":")
            yield key
            if self.take("}"):
                return
            self._want(",")

    def _want(self, character: str) -> None:
        if not self.take(character):
            seen = repr(self.rest(20)) if self.next() else "the end of the file"
            raise JsonTextError(self.line, f"not JSON: `{character}` is missing before {seen}")

    def _take_next(self, character: str) -> bool:
        """Takes the very next character if it is this one; returns whether it was."""
        while self._at == len(self._text) and not self._ended:
            self._read()
        found = self._text.startswith(character, self._at)
        self._at += found
        return found

    def _read(self) -> None:
        """Reads on, and forgets what was taken."""
        line, taken, kept = self.line, self._text[: self._at], self._text[self._at :]
        start = taken.rfind("\n") + 1
        self._column = len(taken) - start + (0 if start else self._column)
        if len(kept) > json_lines.LONGEST:
            raise JsonTextError(line, "a value without an end", length=len(kept))
        data = self._file.read(max(_BLOCK, len(kept)))
        self._ended = not data
        try:
            more = self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            line += kept.count("\n") + error.object[: error.start].count(b"\n")
            problem = f"not UTF-8: byte 0x{error.object[error.start]:02x}"
            raise JsonTextError(line, problem, not_utf8=True) from error
        self._text, self._at, self._line, self._counted = kept + more, 0, line, (0, line)

    def _not_json(self, error: json.JSONDecodeError) -> JsonTextError:
        column = error.colno + (self._column if error.lineno == 1 else 0)
        return JsonTextError(self._line + error.lineno - 1, f"not JSON: {error.msg}, column {column}")
