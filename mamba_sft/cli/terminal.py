"""The terminal chat: reads lines, obeys commands, shows answers as they are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mamba_sft.cli.printable import printable
from mamba_sft.errors import MambaSFTError, UsageError
from mamba_sft.inference.sessions import ChatSession, CompareSession, Turn
from mamba_sft.recipe.builtin import expanded
from mamba_sft.wording import size_text

Session = ChatSession | CompareSession

COMMANDS = {
    "/help": "show this",
    "/retry": "answer the last message again",
    "/undo": "take back the last message and its answer",
    "/reset": "forget the conversation",
    "/system TEXT": "set the system message; without TEXT, show it",
    "/save FILE": "add the conversation to a JSON Lines file that a recipe can train on",
    "/quit": "leave, like Ctrl-D; Ctrl-C ends an answer, and once more leaves",
}
BLOCK = '"""'


def chat_loop(session: Session, console: Console, read_line: Callable[[str], str]) -> None:
    """Holds a conversation until the input ends, `/quit`, or a second Ctrl-C in a row, at the prompt.

    On a terminal it streams, shows speeds, and catches errors. Elsewhere every line is a message, only the
    answers are written, and an error ends it.

    Args:
        session: Who to talk to.
        console: Where answers go.
        read_line: Shows a prompt and returns a line without its end; raises EOFError when there are no more.

    Raises:
        MambaSFTError: Whatever a command or message caused, when `console` is not a terminal.
    """
    if console.is_terminal:
        console.print(_banner(session))
    interrupted = False
    while True:
        try:
            line = _read_message(read_line, "> " if console.is_terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted or not console.is_terminal:
                return
            interrupted = True  # it may have been meant for an answer that ended just then
            _note(console, "\nonce more leaves")
            continue
        if line.strip() == "/quit":
            return
        try:
            interrupted = bool(line.strip()) and _take(session, console, line)
        except MambaSFTError as error:
            if not console.is_terminal:
                raise
            _complain(console, error)


def _read_message(read_line: Callable[[str], str], prompt: str) -> str:
    """Reads a line, or the lines between two lines of three quotation marks."""
    line = read_line(prompt)
    if line.strip() != BLOCK:
        return line
    lines = []
    while (line := read_line(". " if prompt else "")).strip() != BLOCK:
        lines.append(line)
    return "\n".join(lines)


def _take(session: Session, console: Console, line: str) -> bool:
    """Obeys a command or answers a message. Returns whether Ctrl-C ended the answer."""
    word, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if not re.fullmatch(r"/[a-z]+", word):
        return _show(session, console, session.send(line))
    if word == "/retry":
        return _show(session, console, session.retry())
    if word == "/undo":
        _note(console, f"took back: {session.undo()}")
    elif word == "/reset":
        session.reset()
        _note(console, "the conversation is forgotten")
    elif word == "/system":
        if rest:
            session.system = rest
        _note(console, f"system message: {session.system or 'none'}")
    elif word == "/save":
        if not rest:
            raise UsageError("`/save` needs a file", hint="for example `/save chats.jsonl`")
        session.save(expanded(rest))
        _note(console, f"added the conversation to {rest}")
    elif word == "/help":
        console.print(_help())
    else:
        raise UsageError(f"no command `{word}`", hint="there are " + ", ".join(COMMANDS))
    return False


def _show(session: Session, console: Console, answer: Iterator[Any]) -> bool:
    show = _show_one if isinstance(session, ChatSession) else _show_two
    try:
        return show(session, console, answer)  # type: ignore[arg-type]
    finally:
        answer.close()  # type: ignore[attr-defined]


def _show_one(session: ChatSession, console: Console, answer: Iterator[str]) -> bool:
    interrupted = _drain(answer, lambda piece: _write(console, piece))
    _write(console, "\n")
    _note(console, _describe(session.last_turn))
    return interrupted


def _show_two(session: CompareSession, console: Console, answer: Iterator[tuple[int, str]]) -> bool:
    columns = _Columns([side.chat_model.name for side in session.sides], tail=True)
    live = Live(columns, console=console, refresh_per_second=12, transient=True)
    with live if console.is_terminal else nullcontext():
        interrupted = _drain(answer, columns.add)
    if not console.is_terminal:
        for name, text in zip(columns.names, columns.texts, strict=True):
            _write(console, f"{name}: {text}\n")
        return interrupted
    columns.tail = False
    console.print(columns)
    notes = _grid(len(session.sides))
    notes.add_row(*(Text(_describe(side.last_turn), style="dim") for side in session.sides))
    console.print(notes)
    return interrupted


def _drain(answer: Iterator[Any], show: Callable[[Any], None]) -> bool:
    """Shows the pieces of an answer. Returns whether Ctrl-C ended it; what is there stays."""
    try:
        for piece in answer:
            show(piece)
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
        return True
    return False


class _Columns:
    """Texts side by side; while they grow, only the lines that fit the screen, the last ones.

    Args:
        names: The columns' headings.
        tail: Whether to keep to the height of the screen.
    """

    def __init__(self, names: list[str], *, tail: bool):
        self.names = names
        self.texts = [""] * len(names)
        self.tail = tail

    def add(self, piece: tuple[int, str]) -> None:
        """Appends to one side."""
        side, text = piece
        self.texts[side] += text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = _grid(len(self.names))
        table.add_row(*(Text(printable(name), style="bold") for name in self.names))
        width = options.max_width // len(self.names) - 2
        table.add_row(*(self._column(console, text, width) for text in self.texts))
        yield table

    def _column(self, console: Console, text: str, width: int) -> Group | Text:
        shown = Text(printable(text.strip("\n")))
        if not self.tail:
            return shown
        return Group(*shown.wrap(console, width)[-(console.height - 3) :])


def _grid(columns: int) -> Table:
    grid = Table.grid(expand=True, padding=(0, 2))
    for _ in range(columns):
        grid.add_column(ratio=1, overflow="fold")
    return grid


def _write(console: Console, text: str) -> None:
    """Writes text as it comes; a terminal gets its printable form, in which no character waits for others."""
    if console.is_terminal:
        console.print(Text(printable(text)), end="", soft_wrap=True)
    else:
        console.file.write(text)
        console.file.flush()


def _note(console: Console, text: str) -> None:
    if console.is_terminal:
        console.print(Text(printable(text), style="dim"))


def _complain(console: Console, error: MambaSFTError) -> None:
    console.print(Text(printable(error.message), style="red"))
    if error.hint:
        _note(console, error.hint)


def _describe(turn: Turn | None) -> str:
    if turn is None:
        return "interrupted before the first token; the message is taken back"
    parts = [f"{turn.tokens} tokens"]
    if turn.tokens_per_second is not None:
        parts.append(f"{turn.tokens_per_second:.1f} tokens/s")
    parts.append(f"{turn.seen:,} tokens seen")
    if turn.finish_reason == "length":
        parts.append("cut off at `max_new_tokens`")
    elif turn.finish_reason == "interrupted":
        parts.append("interrupted")
    if turn.reread:
        parts.append("the conversation was read again from the start")
    return " · ".join(parts)


def _banner(session: Session) -> Text:
    sides = [session] if isinstance(session, ChatSession) else list(session.sides)
    names = " | ".join(side.chat_model.name for side in sides)
    state = size_text(sides[0].chat_model.state_bytes)
    limit = f"no context limit: a conversation of any length is a state of {state}"
    return Text(printable(f"{names}\n{limit}\n/help lists the commands"), style="dim")


def _help() -> Table:
    table = Table.grid(padding=(0, 2))
    for command, meaning in COMMANDS.items():
        table.add_row(Text(command, style="bold"), meaning)
    table.add_row(Text(BLOCK, style="bold"), "begin and end a message of several lines")
    return table
