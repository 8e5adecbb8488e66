"""How counts, sizes, times and paths are written for people: one spelling each, everywhere."""

from __future__ import annotations

import re
from pathlib import Path

UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u202a-\u202e\u2066-\u2069"  # what turns the direction of writing round
    "\u2028\u2029"  # ends of lines to some terminals only
    "\ufeff\U000e0000-\U000e007f"  # a byte order mark and tags: letters that do not show
    "\ud800-\udfff]"  # halves of characters, and bytes that were not UTF-8
)
"""What would steer a terminal, or show other text than is there."""


KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
"""The one family of units for sizes, that of drivers, `free -h` and torch's messages. A GPU "with 24 GB" has
24 of these GiB: there GB is part of its name."""


def size_text(nbytes: float) -> str:
    """Returns a number of bytes with three figures: `13.5 GiB`, `224 MiB`; a GiB is 2^30 bytes."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        value = nbytes / unit
        if abs(value) >= 0.9995:
            digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
            return f"{value:,.{digits}f} {name}"
    return f"{nbytes:,.0f} bytes"


def time_text(seconds: float) -> str:
    """Returns a time in the largest unit that says enough: `85 s`, `28 min`, `11.8 h`, `3.2 days`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 120:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def count_text(count: int, what: str, plural: str = "s") -> str:
    """Returns a number of things: `1 step`, `2,000 steps`; `plural` is what more than one has at the end."""
    return f"{count:,} {what}" + (plural if count != 1 else "")


def path_text(path: Path) -> str:
    """Returns a path as messages show it: from the working directory where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def shown(text: str, limit: int = 80) -> str:
    """Returns foreign text as messages show it, on one line and not too long.

    What does not print (control characters, line ends, halves of a pair) becomes an escape, so that it
    cannot steer a terminal; of a text beyond `limit` its beginning is left, and its length is told.
    """
    start = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text[:limit]
    )
    return start if len(text) <= limit else f"{start}… ({len(text):,} characters)"


def printable(text: str) -> str:
    """Returns `text` with control characters and their like written out; tabs and newlines stay."""
    return UNPRINTABLE.sub(_written_out, text.replace("\r\n", "\n"))


def first_line(error: BaseException) -> str:
    """Returns the first line of what an exception says, or its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _written_out(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
