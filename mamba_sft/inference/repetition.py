"""Does an answer go round in a circle? Told from its end, token by token.

An answer repeats itself in either of two ways:

- It ends in one block of tokens, at most `LONGEST_BLOCK` of them, at least `TIMES` times in a row, and these
  are `ENOUGH` tokens or more: a word a hundred times, a sentence of twenty tokens five times, a paragraph
  three times.
- For `2 * ENOUGH` tokens or more it has written no line that it had not written before, in whatever order,
  and these lines stand there `TIMES` times each on average.

Where people repeat on purpose it takes `PATIENCE` times as much: in a block without letters (a table of
zeros, a line of dashes), and inside a block of code. Blank lines and lines without letters do not count.

A list whose entries differ, code, and a refrain between verses are no circles: between them is something new.
"""

from __future__ import annotations

TIMES = 3
"""A block, or a line on average, has to stand so often."""
ENOUGH = 96
"""Tokens that a block's repetitions have to fill; lines in any order have to fill twice as many."""
PATIENCE = 4
"""How much more it takes without letters, and in code."""
LONGEST_BLOCK = 256
"""Tokens of the longest block that is looked for."""
_FENCE = "```"


class RepetitionWatch:
    """Follows an answer while it grows; a token costs the same, however long the answer is."""

    def __init__(self) -> None:
        self._blocks = _Blocks()
        self._lines = _Lines()

    def repeats(self, token: int, text: str) -> bool:
        """Takes the next token, and says whether the answer now goes round in a circle.

        Args:
            token: Its id.
            text: What the answer's text grew by with it; may be empty, where it waits for others.
        """
        in_lines = self._lines.repeat(text)
        in_blocks = self._blocks.repeat(token, text, PATIENCE if self._lines.in_code else 1)
        return in_lines or in_blocks


class _Blocks:
    """A block of tokens that comes again and again at once."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._matches = [0] * (LONGEST_BLOCK + 1)  # by length: last tokens that equal the one so far before

    def repeat(self, token: int, text: str, patience: int) -> bool:
        self._tokens.append(token)
        self._texts.append(text)
        found = False
        for block in range(1, min(LONGEST_BLOCK, len(self._tokens) - 1) + 1):
            if self._tokens[-1 - block] != token:
                self._matches[block] = 0
                continue
            self._matches[block] += 1
            found = found or self._is_circle(block, patience)
        return found

    def _is_circle(self, block: int, patience: int) -> bool:
        length, enough = self._matches[block] + block, max(ENOUGH, TIMES * block)
        if length < enough:
            return False
        has_letters = any(map(str.isalpha, "".join(self._texts[-block:])))
        return length >= enough * (patience if has_letters else PATIENCE)


class _Lines:
    """Lines that were all said before.

    Attributes:
        in_code: Whether the text is inside a block of code.
    """

    def __init__(self) -> None:
        self.in_code = False
        self._line = ""
        self._known: set[str] = set()
        self._again: list[str] = []  # known lines since the last new one
        self._tokens = 0  # since then
        self._repeat = False

    def repeat(self, text: str) -> bool:
        self._tokens += 1
        *ended, self._line = (self._line + text).split("\n")
        for line in ended:
            self._take(line.strip())
        return self._repeat

    def _take(self, line: str) -> None:
        if line.startswith(_FENCE):
            self.in_code = not self.in_code
        elif not any(map(str.isalpha, line)):
            return
        elif line not in self._known:
            self._known.add(line)
            self._again, self._tokens = [], 0
        else:
            self._again.append(line)
        enough = 2 * ENOUGH * (PATIENCE if self.in_code else 1)
        often = len(self._again) >= TIMES * len(set(self._again))
        self._repeat = bool(self._again) and often and self._tokens >= enough
