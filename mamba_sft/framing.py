"""An error as a box of text, which notebooks show in place of a traceback; colours are a terminal's codes."""

from __future__ import annotations

import textwrap

from mamba_sft.credentials import without_secrets
from mamba_sft.wording import printable

_WIDTH = 96
_COLORS = {"error": "31", "hint": "36"}
_OTHER = "33"


def error_box(heading: str, message: str, hint: str | None) -> list[str]:
    """Returns the lines of the box.

    Args:
        heading: `error`, or what else it is.
        message: One or more lines.
        hint: How to mend it, or None.
    """
    color = _COLORS.get(heading, _OTHER)
    bar = _colored("│", color)
    lines = [_colored(f"╭─ {heading} " + "─" * (_WIDTH - len(heading)), color)]
    lines += [f"{bar} {line}" for line in _wrapped(message.removeprefix("stopped "))]
    if hint:
        first, *more = _wrapped(hint, taken=len("hint: "))
        lines += [bar, f"{bar} {_colored('hint:', _COLORS['hint'])} {first}"]
        lines += [f"{bar}       {line}" for line in more]
    return [*lines, _colored("╰" + "─" * (_WIDTH + 3), color)]


def _wrapped(text: str, taken: int = 0) -> list[str]:
    """Lines that fit the box; a word that does not, such as a path, stays whole to be copied."""
    lines: list[str] = []
    for line in printable(without_secrets(text)).split("\n"):
        lines += textwrap.wrap(
            line,
            _WIDTH - taken,
            break_long_words=False,
            break_on_hyphens=False,
            subsequent_indent=_indent(line),
        ) or [""]
    return lines


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _colored(text: str, color: str) -> str:
    return f"\x1b[{color}m{text}\x1b[0m"
