"""Lines typed into a chat: edited, completed by Tab, and kept for the next chat.

What is kept is a file of the user's own, readable by nobody else, one line of JSON a message. Where Python
has no readline (on Windows), lines are typed without all that.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from mamba_sft.credentials import without_secrets
from mamba_sft.data.cache import cache_home
from mamba_sft.run import own_partial

KEPT = 1000
"""Messages that come back with the arrow keys; the file is cut to so many when it has twice as many."""

LONGEST = 10_000
"""Characters of a message that is kept: a longer one was hardly typed."""


def history_file() -> Path:
    """Returns where typed messages are kept: beside the prepared rows."""
    return cache_home() / "chat-history.jsonl"


class TypedLines:
    """Reads lines from the terminal, or from what stands in for one.

    Args:
        history: Where to keep what is typed; None keeps nothing.
        complete: Returns the lines that an unfinished line may become.
        tell: Called once with the reason where nothing can be kept.
    """

    def __init__(
        self,
        history: Path | None,
        complete: Callable[[str], list[str]],
        tell: Callable[[str], None],
    ):
        self.are_typed = sys.stdin.isatty()
        self.history = history if self.are_typed else None
        self._tell = tell
        self._readline = _readline_for(complete) if self.are_typed else None
        self._last = ""
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a pipe may hold anything
        self._recall()

    def read(self, prompt: str) -> str:
        """Shows a prompt and returns the next line without its end.

        Raises:
            EOFError: There are no more.
        """
        if self.are_typed:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def remember(self, text: str) -> None:
        """Keeps a message or command, unless it begins with a blank, is very long, or the last one again."""
        if text[:1].isspace() or len(text) > LONGEST or text == self._last:
            return
        self._offer(text)
        if self.history is None:
            return
        line = json.dumps(without_secrets(text)) + "\n"
        try:
            self.history.parent.mkdir(parents=True, exist_ok=True)
            _write(self.history, line, os.O_APPEND)
        except OSError as error:
            self._cannot_keep(error)

    def _offer(self, text: str) -> None:
        """Has the arrow keys bring it back."""
        self._last = text
        if self._readline is not None:
            self._readline.add_history(text)

    def _recall(self) -> None:
        if self.history is None:
            return
        try:
            *lines, rest = self.history.read_text(encoding="utf-8", errors="replace").split("\n")
            if rest or len(lines) > 2 * KEPT:  # a process was killed while it wrote, or there are many
                lines = lines[-KEPT:]
                partial = own_partial(self.history)
                _write(partial, "".join(f"{line}\n" for line in lines), os.O_TRUNC)
                os.replace(partial, self.history)
        except FileNotFoundError:
            return
        except OSError as error:
            self._cannot_keep(error)
            return
        for text in map(_text_in, lines[-KEPT:]):
            if text is not None:
                self._offer(text)

    def _cannot_keep(self, error: OSError) -> None:
        self._tell(f"what is typed is not kept: `{self.history}`: {error.strerror or error}")
        self.history = None


def _text_in(line: str) -> str | None:
    try:
        text = json.loads(line)
    except ValueError:  # somebody edited it
        return None
    return text if isinstance(text, str) else None


def _write(path: Path, text: str, how: int) -> None:
    """Writes to a file that nobody else may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600), "wb") as file:
        os.chmod(path, 0o600)  # one that was there
        file.write(text.encode("utf-8"))


def _readline_for(complete: Callable[[str], list[str]]) -> Any:
    """Sets readline up, and returns it; None where Python has none."""
    try:
        import readline
    except ImportError:
        return None
    found: list[str] = []

    def completer(word: str, number: int) -> str | None:
        if number == 0:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            begin = len(line) - len(word)
            found[:] = [whole[begin:] for whole in complete(line)]
        return found[number] if number < len(found) else None

    readline.set_completer(completer)
    readline.set_completer_delims(" ")  # a path is one word, whatever is in it but blanks
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    readline.set_auto_history(False)  # a message of several lines is one entry
    return readline
