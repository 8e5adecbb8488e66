"""Small pieces that a result is shown by, each as HTML and as text.

Text is escaped, and what would steer a reader's eye is written out. Colours are the notebook's own, with
transparent greys on top, so that the same output reads in light and dark without asking which of them it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Literal, Protocol

from mamba_sft.credentials import without_secrets
from mamba_sft.wording import printable

_FILE = Path(__file__).with_name("style.css")


@cache
def style() -> str:
    """Returns the rules of every output of ours, and of nothing else in the page.

    Each names our class three times: notebooks have rules for tables that would win over one.
    """
    rules = re.sub(r"/\*.*?\*/|\n *", "", _FILE.read_text(encoding="utf-8"))
    return rules.replace(".msft", ".msft.msft.msft")


class Block(Protocol):
    """A piece of a view."""

    def html(self) -> str:
        """As HTML."""

    def text(self) -> str:
        """As lines of text."""


@dataclass(frozen=True)
class View:
    """All that is shown of one result: a title and pieces below it."""

    title: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """As HTML that stands by itself."""
        inner = "".join(block.html() for block in self.blocks)
        return f'<style>{style()}</style><div class="msft"><h4>{clean(self.title)}</h4>{inner}</div>'

    def text(self) -> str:
        """As lines of text."""
        return "\n".join([plain(self.title), *(block.text() for block in self.blocks)])


def clean(text: object) -> str:
    """Returns foreign text as HTML: escaped, secrets as stars, control characters written out."""
    return escape(plain(text))


def plain(text: object) -> str:
    """Returns foreign text as it may be shown."""
    return printable(without_secrets(str(text)))


@dataclass(frozen=True)
class Pairs:
    """Names and what they are; a name that is empty goes on with the line above."""

    pairs: Sequence[tuple[str, object]]

    def html(self) -> str:
        """As a table of two columns."""
        rows = "".join(
            f'<tr><td class="name">{clean(name)}</td><td>{clean(value)}</td></tr>'
            for name, value in self.pairs
        )
        return f"<table>{rows}</table>" if rows else ""

    def text(self) -> str:
        """As two columns."""
        wide = max((len(name) for name, _ in self.pairs), default=0)
        return "\n".join(f"  {name:<{wide}}  {plain(value)}" for name, value in self.pairs)


@dataclass(frozen=True)
class Cell:
    """A cell of a table with a mark: right, wrong, or neither."""

    value: object
    right: bool | None = None


@dataclass(frozen=True)
class Table:
    """Rows under titles."""

    titles: Sequence[str]
    rows: Sequence[Sequence[object]]

    def html(self) -> str:
        """As a table; what is right or wrong has a mark and a coloured edge."""
        head = "".join(f"<th>{clean(title)}</th>" for title in self.titles)
        body = "".join(f"<tr>{''.join(map(_cell_html, row))}</tr>" for row in self.rows)
        return f"<table><tr>{head}</tr>{body}</table>"

    def text(self) -> str:
        """A line for each row."""
        lines = [" | ".join(_cell_text(cell) for cell in row) for row in (self.titles, *self.rows)]
        return "\n".join(f"  {line}" for line in lines)


MARKS = {True: "✓ ", False: "✗ ", None: ""}


def _cell_html(cell: object) -> str:
    if not isinstance(cell, Cell) or cell.right is None:
        return f"<td>{clean(cell.value if isinstance(cell, Cell) else cell)}</td>"
    kind = "good" if cell.right else "bad"
    return f'<td><div class="{kind}">{MARKS[cell.right]}{clean(cell.value)}</div></td>'


def _cell_text(cell: object) -> str:
    marked = cell if isinstance(cell, Cell) else Cell(cell)
    return MARKS[marked.right] + " ".join(plain(marked.value).split())


@dataclass(frozen=True)
class Bars:
    """Names and sizes, each with a bar in proportion to a whole; what is over it is red."""

    rows: Sequence[tuple[str, float, str]]
    whole: float

    def html(self) -> str:
        """As a table with bars."""
        lines = ""
        for name, size, told in self.rows:
            share = size / self.whole if self.whole else 0.0
            over = " over" if share > 1 else ""
            lines += (
                f'<tr><td class="name">{clean(name)}</td><td class="name">{clean(told)}</td>'
                f'<td><div class="track">'
                f'<div class="fill{over}" style="width:{100 * min(1.0, share):.1f}%"></div></div></td></tr>'
            )
        return f"<table>{lines}</table>"

    def text(self) -> str:
        """Names and figures."""
        wide = max((len(name) for name, _, _ in self.rows), default=0)
        return "\n".join(f"  {name:<{wide}}  {told}" for name, _, told in self.rows)


@dataclass(frozen=True)
class Text:
    """Words: a heading, a note that stands out, or code to copy."""

    words: str
    kind: Literal["heading", "note", "code", "line"] = "line"

    def html(self) -> str:
        """As an element of its kind."""
        first, last = {
            "heading": ("<h5>", "</h5>"),
            "note": ('<div class="note">', "</div>"),
            "code": ("<pre>", "</pre>"),
            "line": ("<div>", "</div>"),
        }[self.kind]
        return f"{first}{clean(self.words)}{last}"

    def text(self) -> str:
        """The words."""
        return f"{'! ' if self.kind == 'note' else ''}{plain(self.words)}"


@dataclass(frozen=True)
class Markup:
    """Markup of ours that is safe already, such as a drawing, with words for those who cannot see it."""

    markup: str
    words: str

    def html(self) -> str:
        """The markup."""
        return self.markup

    def text(self) -> str:
        """The words."""
        return self.words


@dataclass(frozen=True)
class Fold:
    """Pieces behind a line that opens them; as text only the line."""

    title: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """As a closed `<details>`."""
        inner = "".join(block.html() for block in self.blocks)
        return f"<details><summary>{clean(self.title)}</summary>{inner}</details>"

    def text(self) -> str:
        """What is behind it."""
        return f"  ({plain(self.title)})"
