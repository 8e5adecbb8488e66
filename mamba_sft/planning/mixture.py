"""The course of a run whose sources are mixed, stage after stage, on tokens that are prepared already.

A mixture has no epochs: rows are dealt from the sources until the run is over (`data.mixing`), packed to the
length of their stage, a window at a time, and taken by optimizer steps. Everything follows from the recipe,
the seed and the lengths of the rows, so a run goes on in the middle of a stage from the number of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_sft.data.mixing import Dealer, Pieces, shares
from mamba_sft.data.packing import assign_bins
from mamba_sft.errors import DataError
from mamba_sft.planning.course import Course, ramped_size
from mamba_sft.recipe.fields import StageSection
from mamba_sft.recipe.mixtures import source_ids

if TYPE_CHECKING:
    from mamba_sft.recipe.recipe import Recipe

WINDOW = 64
"""Full rows that are packed together: enough to fill them, few enough to keep mixture and order."""


@dataclass(frozen=True)
class Stage:
    """What a stage of a run came to.

    Args:
        first: Its first step, from 1.
        last: Its last step.
        max_length: Tokens of its longest row; None: any.
        tokens: Id of a source -> tokens read of it.
    """

    first: int
    last: int
    max_length: int | None
    tokens: dict[str, int]


@dataclass(frozen=True)
class Mixture:
    """A run that is mixed.

    Args:
        course: Its steps, which take the packed rows one after the other.
        pieces: (m,) int64, the rows inside all packed rows, in the order in which they are read.
        counts: (T,) int64, how many of them each packed row holds.
        lengths: (T,) int64, tokens of each packed row.
        stages: What each stage came to.
        passes: Id of a source -> how often it is read.
    """

    course: Course
    pieces: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    stages: list[Stage]
    passes: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns stages and passes as JSON can hold them."""
        passes = {name: round(value, 3) for name, value in self.passes.items()}
        return {"stages": [asdict(stage) for stage in self.stages], "passes": passes}


def plan_mixture(recipe: Recipe, pieces: Pieces, *, processes: int = 1) -> Mixture:
    """Returns the course of a run with `data.mixture`.

    A run of `max_steps` has stages that end at shares of its steps; one of `num_train_epochs` reads so often
    as many tokens as all sources hold, and its stages end at shares of these.

    Args:
        recipe: Sources, mixture, stages, batch and length of the run; the accumulation is settled.
        pieces: The training rows.
        processes: Processes that share a step's rows out.

    Raises:
        DataError: A stage has no rows.
    """
    return _Planner(recipe, pieces, processes).plan()


def last_step(section: StageSection, steps: int) -> int:
    """Returns the step that a stage ends with in a run of so many steps."""
    return steps if section.until is None else round(section.until * steps)


class _Planner:
    """Takes steps, one after the other, and keeps what they took."""

    def __init__(self, recipe: Recipe, pieces: Pieces, processes: int):
        self.recipe = recipe
        self.pieces = pieces
        train, data = recipe.train, recipe.data
        if data.mixture is None:
            raise ValueError("the recipe has no `data.mixture`")
        self.mixture = data.mixture
        self.size = train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1) * processes
        self.ids = source_ids(data)
        limits = [source.max_epochs for source in data.sources]
        self.dealer = Dealer(pieces, limits, by=self.mixture.by, seed=recipe.seed)
        self.all_tokens = int(pieces.length.sum())
        self.bins: list[list[int]] = []
        self.starts = [0]
        self.tokens: list[int] = []
        self.read = 0

    def plan(self) -> Mixture:
        stages = [
            self._take_stage(number, section)
            for number, section in enumerate(self.recipe.train.stages or [StageSection()])
            if not self._is_over(section)
        ]
        counts = np.array([len(rows) for rows in self.bins], dtype=np.int64)
        inside = np.array([piece for rows in self.bins for piece in rows], dtype=np.int64)
        lengths = np.add.reduceat(self.pieces.length[inside], np.cumsum(counts) - counts).astype(np.int64)
        epochs = np.cumsum(self.tokens) / max(1, self.all_tokens)
        course = Course(np.arange(len(self.bins)), np.array(self.starts), np.array(self.tokens), epochs)
        passes = dict(zip(self.ids, self.dealer.passes, strict=True))
        return Mixture(course, inside, counts, lengths, stages, passes)

    def _is_over(self, section: StageSection) -> bool:
        """Whether the run has come to where a stage ends."""
        if self.recipe.train.max_steps > 0:
            return len(self.tokens) >= last_step(section, self.recipe.train.max_steps)
        share = 1.0 if section.until is None else section.until
        return self.read >= share * self.recipe.train.num_train_epochs * self.all_tokens

    def _take_stage(self, number: int, section: StageSection) -> Stage:
        longest = section.max_length or self.recipe.data.max_length
        dealt = self.dealer.stage(
            self._shares(number, section, longest),
            longest=longest,
            curriculum=section.curriculum or self.mixture.curriculum,
        )
        packer = _Packer(self, dealt, longest, np.random.default_rng((self.recipe.seed, number)))
        first, first_bin = len(self.tokens), len(self.bins)
        while not self._is_over(section):
            ramp = self.recipe.train.batch_ramp
            rows = packer.take(self.size if ramp is None else ramped_size(ramp, self.read))
            if not rows:
                break
            self.bins += rows
            self.starts.append(len(self.bins))
            self.tokens.append(sum(int(self.pieces.length[piece]) for one in rows for piece in one))
            self.read += self.tokens[-1]
        packer.put_back()
        if len(self.tokens) == first:
            raise DataError(
                f"stage {number + 1} of `train.stages` has no row left: its sources have been read as often "
                "as their `max_epochs` allow",
                hint="raise the `max_epochs` of a source, or shorten the run",
            )
        read = np.array([piece for rows in self.bins[first_bin:] for piece in rows])
        tokens = np.bincount(self.pieces.source[read], self.pieces.length[read], len(self.ids))
        by_source = {name: int(count) for name, count in zip(self.ids, tokens, strict=True) if count}
        return Stage(first + 1, len(self.tokens), longest, by_source)

    def _shares(self, number: int, section: StageSection, longest: int | None) -> dict[int, float]:
        if section.sources is None:
            weights = {index: source.weight for index, source in enumerate(self.recipe.data.sources)}
        else:
            weights = {self.ids.index(name): weight for name, weight in section.sources.items()}
        found = shares(
            weights, self.pieces.up_to(longest), by=self.mixture.by, temperature=self.mixture.temperature
        )
        lacking = [self.ids[index] for index, weight in weights.items() if weight and index not in found]
        most = f" of at most {longest:,} tokens" if longest is not None else ""
        if lacking and not self.recipe.train.stages:
            raise DataError(
                f"`data.mixture` reads `{lacking[0]}`, which has no row{most} to train on",
                hint="leave the source out, or lower `data.validation` if that holds its rows out",
            )
        if lacking:
            raise DataError(
                f"stage {number + 1} of `train.stages` reads `{lacking[0]}`, which has no row{most}",
                hint="raise the stage's `max_length`, or leave the source out of it",
            )
        return found


class _Packer:
    """Packs rows as they are dealt, a window at a time; without packing, each row stays by itself."""

    def __init__(
        self, planner: _Planner, dealt: Iterator[int], longest: int | None, rng: np.random.Generator
    ):
        self.planner = planner
        self.dealt = dealt
        self.longest = longest if planner.recipe.data.packing else None
        self.rng = rng
        self.seen: list[int] = []  # every row as it was dealt
        self.ready: list[list[int]] = []  # packed rows: which of those are in each

    def take(self, count: int) -> list[list[int]]:
        """Returns so many packed rows, or fewer where no more are dealt."""
        while len(self.ready) < count and (window := self._window(count - len(self.ready))):
            self.ready += self._pack(window)
        taken, self.ready = self.ready[:count], self.ready[count:]
        return [[self.seen[row] for row in rows] for rows in taken]

    def put_back(self) -> None:
        """Gives rows back that were packed and not taken, in the order in which they were dealt."""
        self.planner.dealer.put_back([self.seen[row] for row in sorted(chain(*self.ready))])
        self.ready = []

    def _window(self, missing: int) -> range:
        lengths, first, tokens = self.planner.pieces.length, len(self.seen), 0
        for piece in self.dealt:
            self.seen.append(piece)
            tokens += int(lengths[piece])
            if self.longest is None and len(self.seen) - first == missing:
                break
            if self.longest is not None and tokens >= WINDOW * self.longest:
                break
        return range(first, len(self.seen))

    def _pack(self, window: range) -> list[list[int]]:
        if self.longest is None:
            return [[row] for row in window]
        lengths = self.planner.pieces.length[self.seen[window.start : window.stop]]
        return [[window[row] for row in rows] for rows in assign_bins(lengths, self.longest, self.rng)]
