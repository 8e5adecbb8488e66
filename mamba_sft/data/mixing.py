"""Rows of several sources dealt out in given shares, by chance or from easy to hard.

Shares are kept at every moment and not only on average: the next row comes from the source that is furthest
behind its share. Each source is read pass after pass, every pass in an order of its own, and goes on in one
stage where it stopped in the one before, so that no row is read twice before all have been read once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Pieces:
    """What is known of rows without reading a token of them; of pieces, where rows were cut.

    Args:
        source: (p,) int, the number of the source that each came from.
        length: (p,) int, its tokens.
        difficulty: (p,) float64, from the column that the recipe names; NaN where there is none.
    """

    source: np.ndarray
    length: np.ndarray
    difficulty: np.ndarray

    def up_to(self, longest: int | None) -> Pieces:
        """Returns those of at most so many tokens; all of them for None."""
        if longest is None:
            return self
        fits = self.length <= longest
        return Pieces(self.source[fits], self.length[fits], self.difficulty[fits])


def shares(
    weights: Mapping[int, float], pieces: Pieces, *, by: str, temperature: float | None
) -> dict[int, float]:
    """Returns the share of each source, adding up to 1.

    With a temperature T a source's size n counts as n^(1/T): 1 mixes in proportion to the sizes, a large T
    evenly (Raffel et al., arXiv 1910.10683, section 3.5.2). Without one, the weights alone count.

    Args:
        weights: Number of a source -> its weight.
        pieces: The rows.
        by: What sizes are measured in: `tokens` or `rows`.
        temperature: T, or None.
    """
    counts = pieces.length if by == "tokens" else np.ones(len(pieces.length))
    sizes = {number: float(counts[pieces.source == number].sum()) for number in weights}
    found = {
        number: weight * (sizes[number] ** (1 / temperature) if temperature is not None else 1.0)
        for number, weight in weights.items()
        if sizes[number] and weight
    }
    total = sum(found.values())
    return {number: value / total for number, value in found.items()}


@dataclass
class _Source:
    """A source that is being read.

    Args:
        pieces: All rows of it.
        most_passes: How often it may be read.
        fitting: The rows of this pass that the stage may still be dealt, in their order.
        later: Those that are too long for it.
        passes: How many passes were begun.
        dealt: Rows that were dealt and not put back.
    """

    pieces: np.ndarray
    most_passes: float
    fitting: deque[int] = field(default_factory=deque)
    later: list[int] = field(default_factory=list)
    passes: int = 0
    dealt: int = 0


class Dealer:
    """Deals out rows, one stage after the other.

    Args:
        pieces: The rows.
        most_passes: For each source, how often it may be read at most; None: as often as it is asked for.
        by: What shares are shares of: `tokens` or `rows`.
        seed: Decides the order of every pass.
    """

    def __init__(self, pieces: Pieces, most_passes: Sequence[float | None], *, by: str, seed: int):
        self.pieces = pieces
        self.by = by
        self.seed = seed
        self._sources = [
            _Source(np.flatnonzero(pieces.source == number), np.inf if most is None else most)
            for number, most in enumerate(most_passes)
        ]

    def stage(
        self, wanted: Mapping[int, float], *, longest: int | None = None, curriculum: str | None = None
    ) -> Iterator[int]:
        """Yields rows in the given shares until every source is exhausted, which may be never.

        A row that is longer than `longest` waits for a later stage. A source that has no more rows leaves its
        share to the others.

        Args:
            wanted: Number of a source -> its share.
            longest: Tokens of the longest row that is dealt; None: any.
            curriculum: `length` or `difficulty`: the order of a pass, from low to high; None: by chance.
        """
        for number in wanted:
            source = self._sources[number]
            self._sort_in(source, [*source.later, *source.fitting], longest, curriculum)
        taken = dict.fromkeys(wanted, 0.0)
        while taken:
            number = min(taken, key=lambda source: (taken[source] / wanted[source], source))
            source = self._sources[number]
            if not source.fitting and source.passes < source.most_passes:
                self._sort_in(source, [*source.later, *self._new_pass(number)], longest, curriculum)
            if not source.fitting:
                del taken[number]
                continue
            piece = source.fitting.popleft()
            source.dealt += 1
            taken[number] += float(self.pieces.length[piece]) if self.by == "tokens" else 1.0
            yield piece

    def put_back(self, pieces: Sequence[int]) -> None:
        """Takes rows back that were dealt and not used: they are the next ones of their sources again."""
        for piece in reversed(pieces):
            source = self._sources[int(self.pieces.source[piece])]
            source.fitting.appendleft(piece)
            source.dealt -= 1

    @property
    def passes(self) -> list[float]:
        """How often each source has been read so far."""
        return [source.dealt / max(1, len(source.pieces)) for source in self._sources]

    def _sort_in(self, source: _Source, rows: list[int], longest: int | None, curriculum: str | None) -> None:
        """Sorts what is left of a pass into what the stage may be dealt, in its order, and the rest."""
        left = np.array(rows, dtype=np.int64)
        if curriculum is not None:
            key = self.pieces.length if curriculum == "length" else self.pieces.difficulty
            left = left[np.argsort(key[left], kind="stable")]
        fits = np.ones(len(left), bool) if longest is None else self.pieces.length[left] <= longest
        source.fitting, source.later = deque(left[fits].tolist()), left[~fits].tolist()

    def _new_pass(self, number: int) -> list[int]:
        """The rows of the next pass, without those that still wait for a stage they fit into."""
        source = self._sources[number]
        part = min(1.0, source.most_passes - source.passes)
        order = np.random.default_rng((self.seed, number, source.passes)).permutation(source.pieces)
        order = order[: max(1, round(part * len(order)))]
        source.passes += 1
        waiting = np.isin(order, np.array(source.later, dtype=np.int64))
        return [*map(int, order[~waiting])]
