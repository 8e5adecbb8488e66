"""Two answers side by side, while they grow and when they have ended."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from mamba_sft.cli.printable import printable

LONG = 256
"""Tokens of a message whose reading is worth a word."""


def reading_text(done: int, tokens: int) -> str:
    """Returns how far a message has been read."""
    return f"reading {tokens:,} tokens ..." if not done else f"reading {tokens:,} tokens, {done:,} done ..."


class Columns:
    """Texts side by side; while they grow, only the lines that fit the screen, the last ones.

    Args:
        names: The columns' headings.
    """

    def __init__(self, names: list[str]):
        self.texts = [""] * len(names)
        self._names = names
        self._reading = [""] * len(names)
        self._notes: list[str] | None = None

    def add(self, piece: tuple[int, str]) -> None:
        """Appends to one side."""
        side, text = piece
        self.texts[side] += text

    def read(self, side: int, done: int, tokens: int) -> None:
        """Notes how far a side has read what it will answer."""
        self._reading[side] = reading_text(done, tokens) if tokens >= LONG else ""

    def end(self, notes: list[str]) -> None:
        """Takes what is to stand below the texts, which are then shown whole."""
        self._notes = notes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table.grid(expand=True, padding=(0, 2))
        for _ in self._names:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*(Text(printable(name), style="bold") for name in self._names))
        width = options.max_width // len(self._names) - 2
        table.add_row(*(self._column(console, side, width) for side in range(len(self._names))))
        if self._notes is not None:
            table.add_row(*(Text(note, style="dim") for note in self._notes))
        yield table

    def _column(self, console: Console, side: int, width: int) -> Group | Text:
        if not self.texts[side]:
            return Text("" if self._notes is not None else self._reading[side], style="dim")
        shown = Text(printable(self.texts[side].strip("\n")))
        if self._notes is not None:
            return shown
        return Group(*shown.wrap(console, width)[-(console.height - 3) :])
