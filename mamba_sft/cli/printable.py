r"""One printable form for text that others wrote: rows, answers, file names, settings, messages.

A character that would steer a terminal, or show other text than is there, stands as Python writes it:
`\x1b` begins no colour, `\u202e` turns no line round, `\udcff` is a byte that was not UTF-8. The console
and the log do it to all that goes through them, so that no caller has to think of it, and a word in brackets
is a word, not a style.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Span, Text

from mamba_sft.credentials import without_secrets
from mamba_sft.wording import UNPRINTABLE, printable

__all__ = ["PrintableConsole", "PrintableFormatter", "printable"]


class PrintableConsole(Console):
    """A console that writes all text in its printable form and reads no markup or `:emoji:` in it.

    Args:
        stderr: Whether it writes to stderr.
        soft_wrap: Whether long lines run on.
    """

    def __init__(self, *, stderr: bool = False, soft_wrap: bool = False, **settings: Any):
        super().__init__(
            stderr=stderr, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False, **settings
        )

    def render_str(self, text: str, **how: Any) -> Text:
        """Makes a text of a string; before `Text` drops what it takes for control characters."""
        return super().render_str(printable(text), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Renders anything: a text is made printable before its lines are broken, the rest on its way out."""
        shown = _printable_text(renderable) if isinstance(renderable, Text) else renderable
        for segment in super().render(shown, options):
            text = segment.text if segment.control else printable(without_secrets(segment.text))
            yield segment._replace(text=text)


def _printable_text(text: Text) -> Text:
    """`text` in its printable form, each character in the styles that it had."""
    found = [match.span() for match in UNPRINTABLE.finditer(text.plain)]
    if not found:
        return text
    shown = text.blank_copy()
    for piece in text.divide(edge for span in found for edge in span):
        plain = printable(piece.plain)
        spans = [Span(0, len(plain), span.style) for span in piece.spans]
        shown.append_text(piece if plain == piece.plain else Text(plain, piece.style, spans=spans))
    return shown


class ConsoleHandler(logging.Handler):
    """Writes log records on a console: above a bar or a spinner that is drawn there, not into its line.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record; what goes wrong is told as `logging` tells it."""
        try:
            self._console.print(Text(self.format(record)), soft_wrap=True)
        except Exception:
            self.handleError(record)


class PrintableFormatter(logging.Formatter):
    """Formats log records in the printable form."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record's text."""
        return printable(without_secrets(super().format(record)))
