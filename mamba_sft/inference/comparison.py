"""The same conversation with two models, answering side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamba_sft.inference.sessions import ChatSession


class CompareSession:
    """The same conversation with two models, answering side by side.

    Args:
        left: A session with the one, such as the base.
        right: A session with the other, such as the tuned model.
    """

    BURST = 8
    """Pieces one side writes before the other goes on: switching an adapter costs as much as a token."""

    def __init__(self, left: ChatSession, right: ChatSession):
        self.sides = (left, right)

    def send(self, text: str) -> Iterator[tuple[int, str]]:
        """Says `text` to both and yields `(side, piece)`, side 0 or 1, until both have answered.

        Raises:
            UsageError: `text` is blank.
        """
        return self._interleave([side.send(text) for side in self.sides])

    def retry(self) -> Iterator[tuple[int, str]]:
        """Like `ChatSession.retry`, on both sides."""
        yield from self.send(self.undo())

    def undo(self) -> str:
        """Like `ChatSession.undo`, on both sides."""
        return [side.undo() for side in self.sides][-1]

    def reset(self) -> None:
        """Like `ChatSession.reset`, on both sides."""
        for side in self.sides:
            side.reset()

    def save(self, path: Path) -> None:
        """Saves the right side's conversation."""
        self.sides[1].save(path)

    @property
    def system(self) -> str | None:
        """The system message of both."""
        return self.sides[1].system

    @system.setter
    def system(self, text: str | None) -> None:
        for side in self.sides:
            side.system = text

    def _interleave(self, answers: list[Iterator[str]]) -> Iterator[tuple[int, str]]:
        going = dict(enumerate(answers))
        try:
            while going:
                for number, answer in list(going.items()):
                    with self.sides[number].talker.held():
                        burst = [piece for _, piece in zip(range(self.BURST), answer, strict=False)]
                    yield from ((number, piece) for piece in burst)
                    if len(burst) < self.BURST:
                        del going[number]
        finally:
            self._stop(answers)

    def _stop(self, answers: list[Any]) -> None:
        """Ends both answers; a message that only one side began to answer is taken back from both."""
        for answer in answers:
            answer.close()
        counts = [len(side.messages) for side in self.sides]
        for side, count in zip(self.sides, counts, strict=True):
            if count > min(counts):
                side.undo()
