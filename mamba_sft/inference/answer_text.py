"""The text of an answer while it grows: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """Turns token ids into text as they come, never yielding half a character.

    A byte-level token may hold part of a UTF-8 character; its bytes wait for the rest. Special tokens give no
    text. All pieces joined are the decoding of all ids.

    Args:
        tokenizer: A fast tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._restart()

    def push(self, token: int) -> str:
        """Returns the text that `token` completes, possibly none."""
        self._waiting.append(token)
        try:
            piece = self._stream.step(self._tokenizer.backend_tokenizer, token)
        except Exception:  # a bare one: bytes that are no text, behind ones that were, undid what was shown
            return self.flush()
        if piece is None:
            return ""
        self._waiting.clear()
        return piece

    def flush(self) -> str:
        """Returns what still waits when the answer ends: bytes that never became a character."""
        piece = decode(self._tokenizer, self._waiting)
        self._restart()
        return piece

    def _restart(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=True)
        self._waiting: list[int] = []  # tokens whose text has not been shown


class AnswerText:
    """The text of one answer, which a stop string ends: no part of one is ever given out.

    What may be the beginning of a stop string waits until it is known whether it is one.

    Args:
        tokenizer: A fast tokenizer.
        stop_strings: Texts that end the answer.
    """

    def __init__(self, tokenizer: Any, stop_strings: Collection[str] = ()):
        self.text = ""
        """All that was given out."""
        self.stopped = False
        """Whether a stop string has ended it."""
        self._stream, self._stops, self._held = TextStream(tokenizer), stop_strings, ""

    def add(self, token: int) -> str:
        """Returns what one more token adds to the text, possibly nothing."""
        return self._give(self._take(self._stream.push(token)))

    def close(self) -> str:
        """Returns what still waits when the answer has ended."""
        piece = self._take(self._stream.flush()) + self._held
        self._held = ""
        return self._give(piece)

    def _give(self, piece: str) -> str:
        self.text += piece
        return piece

    def _take(self, piece: str) -> str:
        """What of the held text and a new piece can be no part of a stop string; holds the rest."""
        if self.stopped:
            return ""
        held = self._held + piece
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        waits = max((_begun(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - waits :]
        return held[: len(held) - waits]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns the text of token ids, without special tokens."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
