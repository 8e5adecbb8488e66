"""Answers as they come: printed in the order of their prompts, and counted on a bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class InOrder:
    """Hands answers on in the order of their prompts, each as soon as all before it are there.

    Args:
        write: Takes a prompt's number and its answer.
    """

    def __init__(self, write: Callable[[int, Any], None]):
        self._write = write
        self._waiting: dict[int, Any] = {}
        self._next = 0

    def __call__(self, number: int, answer: Any) -> None:
        """Takes an answer."""
        self._waiting[number] = answer
        while self._next in self._waiting:
            self._write(self._next, self._waiting.pop(self._next))
            self._next += 1


class AnswerBar:
    """How many answers there are, tokens a second, and the time that is left.

    Args:
        console: Where it is drawn; nothing is where there is no terminal.
        total: How many prompts there are.
        shown: Whether to draw it.
    """

    def __init__(self, console: Console, total: int, *, shown: bool = True):
        self._bar = Progress(
            TextColumn("[bold]answers"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("[green]{task.fields[rate]}"),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not (shown and console.is_terminal),
            redirect_stdout=False,  # what a pipe gets must not go to the terminal instead
        )
        self._task = self._bar.add_task("answers", total=total, rate="")
        self._tokens = 0
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def count(self, number: int, answer: Any, *, kept: bool = False) -> None:
        """Counts one more answer.

        Args:
            number: Its prompt's.
            answer: The answer.
            kept: Whether it is of an earlier time, and says nothing of speed.
        """
        del number
        self._tokens += 0 if kept else answer.tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self._bar.update(self._task, advance=1, rate=f"{rate:,.0f} tokens/s" if self._tokens else "")
