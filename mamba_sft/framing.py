"""An error as a box of text, which notebooks show in place of a traceback; colours are a terminal's codes."""

from __future__ import annotations

import re
import shlex
import textwrap

from mamba_sft.credentials import without_secrets
from mamba_sft.wording import printable

_WIDTH = 96
_COLORS = {"error": "31", "hint": "36"}
_OTHER = "33"
_OPTION = re.compile(r"`--([a-z][a-z-]*)(?: ([^`]+))?`")
_TAKE_VALUES = {
    "output", "name", "dtype", "onto", "format", "quantization", "system", "card", "suite", "tasks", "base",
    "data_dir", "include_path", "chat_template", "math_metric", "limit", "batch_size", "max_length",
}  # fmt: skip
"""Options of the commands that are no switches, and arguments of the functions."""
_COMMAND = re.compile(r"`((?:mamba-sft|hf) [^`]+)`")
CALLS = {
    "chat": ("chat", {"compare", "merged", "system"}),
    "doctor": ("doctor", set[str]()),
    "eval": (
        "evaluate",
        {"suite", "tasks", "base", "dtype", "quantization", "output", "resume", "overwrite"},
    ),
    "export": ("export", {"format", "quantization", "output", "name", "adapter_only"}),
    "merge": ("merge", {"output", "dtype", "onto"}),
    "plan": ("plan", {"card"}),
    "report": ("report", {"output"}),
    "train": ("train", {"resume", "overwrite", "allow_changed_data", "finish"}),
}
"""By verb, the function that does the same, and the options that it has as arguments."""


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


def in_cell(command: str) -> str:
    """Returns a command as a notebook runs it: the call of our function, or the command behind a `!`.

    Args:
        command: Such as `mamba-sft train recipe.yaml --resume`.
    """
    try:
        program, verb, *words = [*shlex.split(command), ""]
    except ValueError:  # a quote that does not end
        return f"!{command}"
    if program != "mamba-sft" or verb not in CALLS:
        return f"!{command}"
    function, options = CALLS[verb]
    given, left = [], iter(words[:-1])
    for word in left:
        name = "quantization" if word == "-q" else word.removeprefix("--").replace("-", "_")
        if not word.startswith("-") and "=" not in word:
            given.append(f'"{word}"')
        elif name in options:
            given.append(f'{name}="{next(left, "")}"' if name in _TAKE_VALUES else f"{name}=True")
        else:  # such as what a recipe is changed by, which no function takes
            return f"!{command}"
    return f"{function}({', '.join(given)})"


def _in_python(text: str) -> str:
    """What is to be typed, as those type it who call functions: `--overwrite` is `overwrite=True`."""
    return _OPTION.sub(_argument, _COMMAND.sub(lambda found: f"`{in_cell(found[1])}`", text))


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
