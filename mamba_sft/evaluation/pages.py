"""How a page comes to be: templates that escape every text, and control characters in a form that is seen.

What a page shows came from data, models, recipes and file names, so none of it is trusted: text is escaped,
what would steer a reader's eye or a terminal is written out, and the page itself forbids scripts and the net.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_KEPT = "\n\t"
_TURNING = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
"""Marks that turn the direction of the text behind them, or cannot be seen at all."""


def visible(text: str) -> str:
    r"""Returns text whose control characters are written out (`\x1b`); line feeds and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(letter) for letter in text)


def _visible(letter: str) -> str:
    hidden = unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") and letter not in _KEPT
    if not hidden and letter not in _TURNING:
        return letter
    return letter.encode("unicode_escape", "backslashreplace").decode("ascii")


def _finalized(value: Any) -> Any:
    return visible(value) if type(value) is str else value  # markup of ours is of another type


def page_text(template: str, **facts: Any) -> str:
    """Returns a page of this room's templates.

    Args:
        template: The file, such as `report.html.jinja`.
        facts: What it shows; only what the template marks as safe comes in as markup.
    """
    environment = Environment(
        autoescape=True,
        finalize=_finalized,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**facts) + "\n"
