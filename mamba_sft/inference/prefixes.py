"""Beginnings that several prompts share, a long system message or a block of examples: each is read once.

A Mamba model reads a beginning into a state of constant size, so a copy of that state is all that the next
prompt with the same beginning needs. Which beginnings are worth it is found on token ids, so it does not
matter where they come from; answers are what they are when everything is read for each prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LEAST = 64
"""Tokens of a beginning that is worth it: rows that start from a state are read in more calls."""
KEPT = 8
"""States that are kept at a time; one of a 7B is 36 MiB."""
WINDOW = 16
"""Batches whose prompts are put in order together. So no answer waits for all that were asked after it."""

_Ids = np.ndarray[Any, np.dtype[np.uint32]]


@dataclass(frozen=True)
class Beginnings:
    """Which prompts begin alike, all by their numbers.

    Args:
        prompts: Token ids.
        lengths: How many of the first tokens of each are those of others; 0 for none.
        groups: The number of the beginning of each; -1 for none.
    """

    prompts: Mapping[int, Sequence[int]]
    lengths: dict[int, int]
    groups: dict[int, int]


def find_beginnings(prompts: Mapping[int, Sequence[int]], least: int = LEAST) -> Beginnings:
    """Returns the beginnings that save most tokens, or nearly so; each prompt has one at most.

    At least one token of every prompt is left to be read for itself.

    Args:
        prompts: Token ids by number.
        least: Shorter beginnings are not worth it.
    """
    lengths, groups = dict.fromkeys(prompts, 0), dict.fromkeys(prompts, -1)
    # bytes of such numbers are in the order of the numbers
    rows = {number: np.asarray(ids, ">u4") for number, ids in prompts.items()}
    order = sorted(rows, key=lambda number: rows[number].tobytes())
    for group, part in enumerate(_best([rows[number] for number in order], least)):
        for row in part.rows:
            lengths[order[row]], groups[order[row]] = part.length, group
    return Beginnings(prompts, lengths, groups)


@dataclass(frozen=True)
class _Part:
    """Rows that read their first `length` tokens together."""

    rows: list[int]
    length: int

    @property
    def gain(self) -> int:
        return (len(self.rows) - 1) * self.length


@dataclass
class _Interval:
    """Neighbours in the order of their ids that have `length` first tokens in common."""

    length: int
    first: int
    parts: list[_Part] = field(default_factory=list)
    """The beginnings that are worth it among them; longer ones than what all have in common."""

    def close(self, last: int, least: int) -> None:
        """Settles whether one more beginning, what all have in common, saves more.

        It is for the rows that have none yet, and for those to whom their longer one is worth less.
        """
        if self.length < least:
            return
        kept = [part for part in self.parts if part.gain > len(part.rows) * self.length]
        taken = {row for part in kept for row in part.rows}
        own = _Part([row for row in range(self.first, last + 1) if row not in taken], self.length)
        if len(own.rows) > 1 and own.gain + _gain(kept) >= _gain(self.parts):
            self.parts = [*kept, own]


def _gain(parts: Sequence[_Part]) -> int:
    return sum(part.gain for part in parts)


def _best(rows: list[_Ids], least: int) -> list[_Part]:
    """The parts of sorted rows that save most, from the tree of what neighbours have in common."""
    open_ones = [_Interval(0, 0)]
    for number in range(1, len(rows)):
        left, right = rows[number - 1], rows[number]
        common = min(common_length(left, right), max(min(len(left), len(right)) - 1, 0))  # one is left
        first, parts = number - 1, []
        while common < open_ones[-1].length:
            closed = open_ones.pop()
            closed.close(number - 1, least)
            first, parts = closed.first, closed.parts
            if common <= open_ones[-1].length:
                open_ones[-1].parts += parts
        if common > open_ones[-1].length:
            open_ones.append(_Interval(common, first, parts))
    while len(open_ones) > 1:
        closed = open_ones.pop()
        closed.close(len(rows) - 1, least)
        open_ones[-1].parts += closed.parts
    return open_ones[0].parts


def common_length(left: np.ndarray, right: np.ndarray) -> int:
    """Returns how many first tokens two texts have in common.

    Args:
        left: Token ids, (L,).
        right: Those of the other, of any length.
    """
    size = min(len(left), len(right))
    differ = left[:size] != right[:size]
    return int(differ.argmax()) if differ.any() else size


def batches(beginnings: Beginnings, batch_size: int) -> Iterator[list[int]]:
    """Yields the numbers of prompts to answer together: of one beginning where they can be, of like length.

    Prompts with a beginning and such without one are never together.
    """
    prompts, lengths, groups = beginnings.prompts, beginnings.lengths, beginnings.groups
    numbers = sorted(prompts)
    for start in range(0, len(numbers), WINDOW * batch_size):
        window = numbers[start : start + WINDOW * batch_size]
        alone = [number for number in window if not lengths[number]]
        begun = [number for number in window if lengths[number]]
        alone.sort(key=lambda number: len(prompts[number]))
        begun.sort(key=lambda number: (groups[number], len(prompts[number]) - lengths[number]))
        for part in (alone, begun):
            for at in range(0, len(part), batch_size):
                yield part[at : at + batch_size]


class KeptStates:
    """The states after the beginnings, the last few of them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def get(self, group: int) -> Any:
        """Returns the state after a beginning, or None where it has not been read, or not lately."""
        if group in self._kept:
            self._kept.move_to_end(group)
        return self._kept.get(group)

    def put(self, group: int, state: Any) -> None:
        """Keeps a state, and lets the one go that was not needed for the longest time."""
        self._kept[group] = state
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
