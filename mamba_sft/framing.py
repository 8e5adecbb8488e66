"""An error as a box of text, which notebooks show in place of a traceback; colours are a terminal's codes."""

from __future__ import annotations

import re
import textwrap

from mamba_sft.credentials import without_secrets
from mamba_sft.wording import printable

_WIDTH = 96
_COLORS = {"error": "31", "hint": "36"}
_OTHER = "33"
_OPTION = re.compile(r"`--([a-z][a-z-]*)(?: ([^`]+))?`")
_TAKE_VALUES = {"output", "name", "dtype", "onto", "format", "quantization", "system"}
"""Options of the commands that are no switches, and arguments of the functions."""


def error_box(heading: str, message: str, hint: str | None) -> list[str]:
    """Returns the lines of the box.

    Args:
        heading: `error`, or what else it is.
        message: One or more lines.
        hint: How to mend it, or None.
    """
    color = _COLORS.get(heading, _OTHER)
    bar = _colored("│", color)
    message, hint = _in_python(message), _in_python(hint or "")
    lines = [_colored(f"╭─ {heading} " + "─" * (_WIDTH - len(heading)), color)]
    lines += [f"{bar} {line}" for line in _wrapped(message.removeprefix("stopped "))]
    if hint:
        first, *more = _wrapped(hint, taken=len("hint: "))
        lines += [bar, f"{bar} {_colored('hint:', _COLORS['hint'])} {first}"]
        lines += [f"{bar}       {line}" for line in more]
    return [*lines, _colored("╰" + "─" * (_WIDTH + 3), color)]


def _in_python(text: str) -> str:
    """`--overwrite` is `overwrite=True` to those who call a function; a whole command stays one."""
    return _OPTION.sub(_argument, text)


def _argument(match: re.Match[str]) -> str:
    name, value = match[1].replace("-", "_"), match[2]
    if value is not None:
        return f'`{name}="{value}"`'
    return f"`{name}=...`" if name in _TAKE_VALUES else f"`{name}=True`"


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
