"""What `-h` prints: what a verb does, an example, and one row for each argument and option.

Typer's own pages draw frames and give each type a column, so that half of them did not fit the 24 rows of a
terminal. A verb's docstring is its page: its first sentence stands in the list of verbs, a line that starts
with `Example:` or with blanks is kept as it is, all else is wrapped.
"""

from __future__ import annotations

import inspect
import shlex
import textwrap
from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

from mamba_sft.errors import UsageError

WIDEST_NAME = 30
"""Columns of an option's name; the text beside a longer one starts on the next row."""

_SHORTER = {"show_completion": "Print that completion"}
"""For texts of typer's own that take two of the rows of a screen."""


class Verb(TyperCommand):
    """A verb whose help is a page of its own."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Writes the usage: arguments by the names that the page gives them."""
        arguments = [param.metavar or param.name for param in self.params if _is_argument(param)]
        formatter.write_usage(ctx.command_path, " ".join([*arguments, "[OPTIONS]"]))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the page."""
        self.format_usage(ctx, formatter)
        _write_text(self.help or "", formatter)
        _write_rows(_parameters(self, ctx), formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses what follows the verb.

        Raises:
            UsageError: Options are there that are fields of the recipe; says how those are written.
        """
        if any(param.name == "overrides" for param in self.params) and not ctx.resilient_parsing:
            own = {name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
            if any(word.startswith("-") and word.partition("=")[0] not in own for word in args):
                _refuse_fields(args, own)
        return super().parse_args(ctx, args)


class Verbs(TyperGroup):
    """Several verbs under one name, listed under what they are for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the page."""
        self.format_usage(ctx, formatter)
        _write_text(self.help or "", formatter)
        verbs = [(name, verb.get_short_help_str(limit=200)) for name, verb in self.commands.items()]
        _write_rows(verbs, formatter)
        _write_rows(_parameters(self, ctx), formatter)


def _refuse_fields(words: list[str], own: set[str]) -> None:
    from mamba_sft.recipe.options import answers

    found = answers(words, own)
    if not found:
        return
    names = ", ".join(f"`{answer.option}`" for answer in found)
    written = " ".join(shlex.quote(answer.override) for answer in found if answer.override)
    reasons = [f"`{answer.option}`: {answer.reason}" for answer in found if answer.reason]
    hints = [f"write `{written}`"] * bool(written) + reasons
    what = "are no options" if len(found) > 1 else "is no option"
    why = ": fields of a recipe are set without dashes" if written else ""
    raise UsageError(f"{names} {what}{why}", hint="; ".join(hints))


def _is_argument(param: Any) -> bool:
    return bool(param.param_type_name == "argument")


def _write_text(text: str, formatter: Any) -> None:
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        formatter.write("" if paragraph.startswith("Example: ") else "\n")
        for line in _lines(paragraph, formatter.width):
            formatter.write(f"{line}\n")


def _lines(paragraph: str, width: int) -> Iterator[str]:
    """The lines of a paragraph: those to be wrapped together, and those that stay as they are."""
    loose: list[str] = []
    for line in paragraph.splitlines():
        if not line.startswith(("  ", "Example: ")):
            loose.append(line)
            continue
        yield from textwrap.wrap(" ".join(loose), width)
        loose = []
        yield line
    yield from textwrap.wrap(" ".join(loose), width)


def _write_rows(rows: list[tuple[str, str]], formatter: Any) -> None:
    formatter.write("\n")
    with formatter.indentation():
        formatter.write_dl(rows, col_max=WIDEST_NAME)


def _parameters(command: Any, ctx: Any) -> list[tuple[str, str]]:
    params = [param for param in command.get_params(ctx) if not getattr(param, "hidden", False)]
    rows: dict[str, tuple[str, str]] = {}
    for param in sorted(params, key=lambda one: not _is_argument(one)):
        panel = getattr(param, "rich_help_panel", None)
        if panel in rows:  # options of one panel stand in one row, that of the first
            rows[panel] = f"{rows[panel][0]} {_name(param)}", panel
        else:
            rows[panel or _name(param)] = _name(param), panel or _text(param)
    return list(rows.values())


def _name(param: Any) -> str:
    if _is_argument(param):
        return str(param.metavar or param.name)
    # of a switch that is on the name that turns it off is told, and what that does
    options = param.secondary_opts if param.secondary_opts and param.default else param.opts
    name = ", ".join(sorted(options, key=len))
    return name if param.is_flag else f"{name} {param.metavar or param.name.upper()}"


def _text(param: Any) -> str:
    text = _SHORTER.get(param.name, str(param.help or "")).rstrip(".")
    if _is_argument(param) or param.is_flag or param.default in (None, "") or callable(param.default):
        return text
    default = f"{param.default:g}" if isinstance(param.default, float) else param.default
    return f"{text}; default: {default}"
