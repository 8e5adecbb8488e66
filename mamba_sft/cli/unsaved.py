"""What a user is asked when a disk does not take the adapter or model: it is in memory until they answer."""

from __future__ import annotations

import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_sft.cli.console import err
from mamba_sft.errors import UsageError
from mamba_sft.recipe.builtin import expanded

if TYPE_CHECKING:
    from mamba_sft.training.keeping import Ask, Unsaved

_GIVE_UP = "give up"


def ask_on_terminal() -> Ask | None:
    """Returns who can be asked: the person at the terminal, or None where there is none."""
    return _Question() if sys.stdin.isatty() and err.is_terminal else None


class _Question:
    """Says once what cannot be saved and why, then waits for an answer, some seconds at a time."""

    def __init__(self) -> None:
        self.said = ""
        self.warned = False

    def __call__(self, unsaved: Unsaved, seconds: float) -> Path | None:
        """Returns another directory, or None to try again. See `training.keeping.Ask`."""
        try:
            self._say(unsaved, seconds)
            answer = _line_within(seconds)
        except KeyboardInterrupt:
            if self.warned:
                raise
            self.warned = True
            err.print(f"the {unsaved.what} is nowhere but in memory; Ctrl-C once more gives it up")
            return None
        if answer is None:
            return None
        self.said, self.warned = "", False
        if answer.lower() == _GIVE_UP:
            raise KeyboardInterrupt
        return self._place(answer) if answer else None

    def _place(self, answer: str) -> Path | None:
        try:
            return expanded(answer)
        except UsageError as error:  # there is no such user, say: what is in memory must not go for that
            err.print(error.message, style="bold red", soft_wrap=True)
            return None

    def _say(self, unsaved: Unsaved, seconds: float) -> None:
        said = f"{unsaved.place}: {unsaved.reason.partition('(')[0]}"  # in brackets is what is left
        if said == self.said:
            return
        self.said = said
        err.print(unsaved.text, style="bold red", soft_wrap=True)
        err.print(
            f"it is kept in memory, and tried again every {seconds:.0f} s. Free some space and press Enter,"
            f" or type another directory to save it in, or `{_GIVE_UP}`:",
            soft_wrap=True,
        )


def _line_within(seconds: float) -> str | None:
    """A line that is typed within some seconds, or None.

    Raises:
        EOFError: Nobody can type any more.
    """
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    if not ready:
        return None
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()
