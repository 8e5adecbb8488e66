"""Lines that keep whole what is to be read or copied as one: file names, and fields to paste.

Print them with `crop=False`: what is longer than the terminal is wide runs on, and a terminal breaks it
without breaking what is copied from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from mamba_sft.cli.printable import printable

_WORD = re.compile(r"(?:`[^`]*`|\S)+")
"""A word; what stands between backticks is part of one, blanks and all."""
_LEAST = 20


class WholeLine:
    """A text that stays on one line, however long it is."""

    def __init__(self, text: Text | str, *, indent: int = 0):
        self.text = Text(" " * indent).append_text(Text(printable(text)) if isinstance(text, str) else text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.text.render(console)
        yield Segment.line()


class WarningList:
    """Warnings, each after a mark: its first line wrapped between words, any further line kept whole."""

    def __init__(self, warnings: Sequence[str], *, indent: int = 0):
        self.warnings = warnings
        self.indent = indent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(_LEAST, options.max_width - self.indent - 2)
        mark = Text("! ", Style.parse("bold yellow"))
        for warning in self.warnings:
            first, *fields = printable(warning).split("\n")
            for number, line in enumerate(_wrapped(first, width)):
                yield WholeLine(Text.assemble(mark if number == 0 else "  ", line), indent=self.indent)
            for line in fields:
                yield WholeLine(Text(f"  {line}", "cyan"), indent=self.indent)


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in _WORD.findall(text):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
    return lines
