"""Rows that cannot be trained on: counted, written down with their reasons, and listed in a message."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from mamba_sft.errors import DataError
from mamba_sft.json_lines import Row
from mamba_sft.wording import count_text

_LISTED = 10
"""Reasons that an error lists."""
_TOLD_APART = 1000
"""Reasons that are counted apart: a reason may hold a text of the row."""


@dataclass
class _Reason:
    """Rows that are bad for the same reason, as the first of them has it."""

    first: str
    text: str
    rows: int = 0

    def line(self) -> str:
        if self.rows == 1:
            return f"  {self.first}: {self.text}"
        return f"  {count_text(self.rows, 'row')}: {self.text}; first at {self.first}"


class BadRows:
    """Collects bad rows; a context manager.

    Args:
        path: Where they are written, as JSON Lines: where each came from, why it is bad, and the row itself.
            No file is made without a bad row.
        on_bad_row: `stop` or `skip`, as the recipe says.
    """

    def __init__(self, path: Path, on_bad_row: Literal["stop", "skip"]):
        self.count = 0
        self._path, self._on_bad_row = path, on_bad_row
        self._file: IO[bytes] | None = None
        self._reasons: dict[str, _Reason] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def stops(self) -> bool:
        """Whether the run will stop for what was found, so that other rows need no work."""
        return self.count > 0 and self._on_bad_row == "stop"

    def add(self, row: Row, reason: str) -> None:
        """Adds a row."""
        self.count += 1
        kind = re.sub(r"\d+", "0", reason)  # turn 3 and turn 5, column 10 and column 14
        if kind in self._reasons or len(self._reasons) < _TOLD_APART:
            self._reasons.setdefault(kind, _Reason(row.where, reason)).rows += 1
        if self._file is None:
            self._file = self._path.open("wb")
        content = {"where": row.where, "reason": reason, "row": row.value}
        # half a surrogate pair, a reason to reject a row, has no UTF-8: it is written as JSON escapes it
        line = json.dumps(content, ensure_ascii=False, default=str) + "\n"
        self._file.write(line.encode("utf-8", "backslashreplace"))

    def stop(self, read: int) -> None:
        """Raises if there is a bad row and the recipe says `stop`.

        Args:
            read: Rows read.

        Raises:
            DataError: It does, and there is; names the reasons and where each occurs first.
        """
        if self.stops:
            raise DataError(
                "\n".join([f"{self.count} of {read} rows cannot be trained on:", *self.listed()]),
                hint="mend them, or set `data.on_bad_row: skip` to leave them out (listed in rejected.jsonl)",
            )

    def listed(self) -> list[str]:
        """The reasons, most rows first, a line each, and how many rows more there are."""
        shown = sorted(self._reasons.values(), key=lambda reason: -reason.rows)[:_LISTED]
        more = self.count - sum(reason.rows for reason in shown)
        return [reason.line() for reason in shown] + ([f"  ... and {more:,} more"] if more else [])
