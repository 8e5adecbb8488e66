"""The terminal chat: reads lines, obeys commands, shows answers as they are written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from mamba_sft.cli.chat_commands import COMMANDS, Typed, command_in, obey
from mamba_sft.cli.columns import LONG, Columns, reading_text
from mamba_sft.cli.printable import printable
from mamba_sft.errors import MambaSFTError
from mamba_sft.inference.sessions import ChatSession, CompareSession, Turn
from mamba_sft.wording import size_text

Session = ChatSession | CompareSession

BLOCK = '"""'
"""Stands alone on the line before and the line after a message of several lines."""
WIDE_ENOUGH = 100
"""Columns of a terminal in which two answers are shown side by side."""
LATE = 0.5
"""Seconds after an answer in which Ctrl-C was meant for it."""
_STOPPED = "[repeats itself; stopped]"


def chat_loop(
    session: Session,
    console: Console,
    read_line: Callable[[str], str],
    *,
    remember: Callable[[str], None] = lambda text: None,
    talks: bool | None = None,
    history: str | None = None,
) -> None:
    """Holds a conversation until the input ends, `/exit`, or Ctrl-C at the prompt.

    With a person it streams, shows speeds, and tells errors. Else every line is a message or a command, only
    the answers are written, and an error or Ctrl-C ends it.

    Args:
        session: Who to talk to.
        console: Where answers go.
        read_line: Shows a prompt and returns a line without its end; raises EOFError when there are no more.
        remember: Is given every message and command.
        talks: Whether a person types and reads; None: whether `console` is a terminal.
        history: Where `remember` keeps things, for `/help`.

    Raises:
        MambaSFTError: Whatever a command or message caused, when no person talks.
    """
    chat = _Chat(session, console, console.is_terminal if talks is None else talks, history)
    chat.note(_banner(session))
    ended = -LATE
    while True:
        try:
            text, is_block = _read_message(read_line, chat.talks)
        except EOFError:
            chat.end_line()
            return
        except KeyboardInterrupt:
            chat.end_line()
            if not chat.talks:
                raise
            if time.monotonic() - ended > LATE:
                return
            chat.note("the answer had ended")
            continue
        if text.strip():
            remember(text)
            if chat.take(text, is_block=is_block):
                return
            ended = time.monotonic()


def _read_message(read_line: Callable[[str], str], talks: bool) -> tuple[str, bool]:
    """Reads a line, or the lines between two lines of three quotation marks. Returns whether it was these."""
    line = read_line("> " if talks else "")
    if line.strip() != BLOCK:
        return line, False
    lines = []
    try:
        while (line := read_line(". " if talks else "")).strip() != BLOCK:
            lines.append(line)
    except EOFError:  # ends the block, too
        pass
    except KeyboardInterrupt:  # takes back the block
        if not talks:
            raise
        return "", True
    return "\n".join(lines), True


class _Chat:
    """A session on a console.

    Args:
        session: Who to talk to.
        console: Where answers go.
        talks: Whether a person types and reads.
        history: Where what is typed is kept.
    """

    def __init__(self, session: Session, console: Console, talks: bool, history: str | None):
        self.talks = talks
        self._session, self._console, self._history = session, console, history
        self._begun = True  # has an answer shown something?
        self._is_reading = False  # which a line says that goes again

    def take(self, text: str, *, is_block: bool) -> bool:
        """Obeys a command or answers a message. Returns whether it was the command to leave."""
        try:
            command = None if is_block else command_in(text)
            if command is None:
                self._show(text)
                return False
            return self._obey(command)
        except MambaSFTError as error:
            if not self.talks:
                raise
            self._console.print(Text(printable(error.message), style="red"))
            self.note(error.hint or "")
        except KeyboardInterrupt:  # between an answer's end and the prompt
            if not self.talks:
                raise
        return False

    def _obey(self, command: Typed) -> bool:
        if command.name == "/exit":
            return True
        if command.name == "/help":
            self._console.print(_help(self._history))
        elif command.name == "/retry":
            if self._session.sampling.temperature == 0 and self._session.messages:
                self.note("the answer will be the same: `temperature` is 0; `/set temperature 0.7` varies it")
            self._show(self._session.undo())
        else:
            self.note(obey(self._session, command))
        return False

    def _show(self, text: str) -> None:
        if isinstance(self._session, ChatSession):
            self._stream(self._session, self._session.send(text))
            self.note(_describe(self._session.last_turn))
        elif self.talks and self._console.width >= WIDE_ENOUGH:
            self._side_by_side(self._session, text)
        else:
            self._in_turn(self._session, text)

    def _in_turn(self, session: CompareSession, text: str) -> None:
        for number, answer in session.in_turn(text):
            side = session.sides[number]
            if self.talks:
                self._console.print(Text(printable(side.chat_model.name), style="bold"))
            else:
                self._write(f"{side.chat_model.name}: ")
            self._stream(side, answer)
            self.note(_describe(side.last_turn))

    def _stream(self, side: ChatSession, answer: Iterator[str]) -> None:
        """Writes an answer as it comes."""
        side.on_read = self._say_reading if self.talks else None
        self._begun = not self.talks
        self._drain(answer, self._write_answer)
        self._forget_reading()
        if side.last_turn is not None and side.last_turn.finish_reason == "repetition":
            self._write(f" {_STOPPED}")
        self._write("\n")

    def _side_by_side(self, session: CompareSession, text: str) -> None:
        columns = Columns([side.chat_model.name for side in session.sides])
        for number, side in enumerate(session.sides):
            side.on_read = partial(columns.read, number)
        with Live(columns, console=self._console, refresh_per_second=12, transient=True):
            self._drain(session.send(text), columns.add)
        for number, side in enumerate(session.sides):
            if side.last_turn is not None and side.last_turn.finish_reason == "repetition":
                columns.add((number, f" {_STOPPED}"))
        columns.end([_describe(side.last_turn) for side in session.sides])
        self._console.print(columns)

    def _drain(self, answer: Iterator[Any], show: Callable[[Any], None]) -> None:
        """Shows the pieces of an answer; Ctrl-C ends it, and what is there stays."""
        try:
            for piece in answer:
                show(piece)
        except KeyboardInterrupt:
            if not self.talks:
                raise
        finally:
            answer.close()  # type: ignore[attr-defined]

    def _write_answer(self, piece: str) -> None:
        """Writes a piece; to a person from the first line that is not empty."""
        shown = piece if self._begun else piece.lstrip("\n")
        self._begun = self._begun or bool(shown)
        self._write(shown)

    def _write(self, text: str) -> None:
        """Writes text as it comes; a terminal gets its printable form: no character waits for others."""
        self._forget_reading()
        if self._console.is_terminal:
            self._console.print(Text(printable(text)), end="", soft_wrap=True)
        else:
            self._console.file.write(text)
            self._console.file.flush()

    def _say_reading(self, done: int, tokens: int) -> None:
        if tokens >= LONG:
            self._is_reading = True
            self._console.print(Text(reading_text(done, tokens), style="dim"), end="\r")

    def _forget_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._console.control(Control((ControlType.ERASE_IN_LINE, 2)))

    def note(self, text: str) -> None:
        """Tells something beside the answers."""
        if self.talks and text:
            self._console.print(Text(printable(text), style="dim"))

    def end_line(self) -> None:
        """Leaves the line of a prompt."""
        if self.talks:
            self._console.print()


def _describe(turn: Turn | None) -> str:
    if turn is None:
        return "interrupted before the first token; the message is taken back"
    parts = [f"{turn.tokens} tokens"]
    if turn.tokens_per_second is not None:
        parts.append(f"{turn.tokens_per_second:.1f} tokens/s")
    parts.append(f"{turn.read:,} read")
    if turn.seen:
        parts.append(f"{turn.seen:,} in all")
    if turn.finish_reason == "length":
        parts.append("cut off at `max_new_tokens`")
    elif turn.finish_reason == "interrupted":
        parts.append("interrupted")
    if turn.repeats and turn.finish_reason != "repetition":
        parts.append("it repeats itself")
    if turn.reread:
        parts.append("the conversation was read again from the start")
    return " · ".join(parts)


def _banner(session: Session) -> str:
    sides = [session] if isinstance(session, ChatSession) else list(session.sides)
    names = " | ".join(side.chat_model.name for side in sides)
    state = size_text(sides[0].chat_model.state_bytes)
    limit = f"no context limit: a conversation of any length is a state of {state}"
    return f"{names}\n{limit}\n/help lists the commands"


def _help(history: str | None) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(Text(f"{name} {command.takes}", style="bold"), command.meaning)
    blocks = "begin and end a message of several lines; what is pasted is one message without them"
    table.add_row(Text(BLOCK, style="bold"), blocks)
    if history is not None:
        kept = f"{history} keeps what you type, but no line that begins with a blank; see --no-history"
        table.add_row(Text("history", style="bold"), Text(kept))
    return table
