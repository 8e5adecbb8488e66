"""Does an answer go round in a circle? Told from its end, token by token.

An answer repeats itself when it ends in one block of tokens, at most `LONGEST_BLOCK` of them, at least
`TIMES` times in a row, and these repetitions are `ENOUGH` tokens or more: a word a hundred times, a sentence
of twenty tokens five times, a paragraph three times. Where people repeat on purpose it takes `PATIENCE` times
as much: in a block without letters (a table of zeros, a line of dashes), and inside a block of code.

A list whose entries differ, code, and a refrain between verses are no circles: the block has to come again at
once, token for token.
"""

from __future__ import annotations

TIMES = 3
"""A block has to stand so often in a row."""
ENOUGH = 96
"""Tokens that the repetitions have to fill."""
PATIENCE = 4
"""How much more it takes without letters, and in code."""
LONGEST_BLOCK = 256
"""Tokens of the longest block that is looked for."""
_FENCE = "```"


class RepetitionWatch:
    """Follows an answer while it grows; a token costs the same, however long the answer is."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._matches = [0] * (
            LONGEST_BLOCK + 1
        )  # by block length: tokens in a row that equal the one a block before
        self._line = ""
        self._in_code = False

    def repeats(self, token: int, text: str) -> bool:
        """Takes the next token, and says whether the answer now ends in a circle.

        Args:
            token: Its id.
            text: What the answer's text grew by with it; may be empty, where it waits for others.
        """
        self._tokens.append(token)
        self._texts.append(text)
        self._follow_fences(text)
        found = False
        for block in range(1, min(LONGEST_BLOCK, len(self._tokens) - 1) + 1):
            if self._tokens[-1 - block] != token:
                self._matches[block] = 0
                continue
            self._matches[block] += 1
            found = found or self._is_circle(block)
        return found

    def _is_circle(self, block: int) -> bool:
        length = self._matches[block] + block
        if length < max(ENOUGH, TIMES * block):
            return False
        said = "".join(self._texts[-block:])
        if not self._in_code and any(letter.isalpha() for letter in said):
            return True
        return length >= PATIENCE * max(ENOUGH, TIMES * block)

    def _follow_fences(self, text: str) -> None:
        """Notes where a line begins a block of code, and where one ends it."""
        *lines, rest = (self._line + text).split("\n")
        for line in lines:
            if line.lstrip().startswith(_FENCE):
                self._in_code = not self._in_code
        self._line = rest
