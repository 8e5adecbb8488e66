"""From prepared rows to the steps of a run: the accumulation, the rows as they are trained, the course.

Epoch by epoch these are the rows that were packed when they were prepared. With `data.mixture` they are dealt
and packed here, stage by stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mamba_sft.data.packing import put_together
from mamba_sft.data.preparing import PreparedData
from mamba_sft.data.rows import row_lengths
from mamba_sft.planning.course import Course, plan_course
from mamba_sft.planning.extent import (
    RunLength,
    length_of_steps,
    run_length,
    settled_accumulation,
    with_accumulation,
)
from mamba_sft.planning.mixture import Mixture, plan_mixture

if TYPE_CHECKING:
    from mamba_sft.recipe.recipe import Recipe


@dataclass(frozen=True)
class Settled:
    """What the rows and the recipe come to.

    Args:
        recipe: With its accumulation written out.
        data: With the training rows as they are trained.
        lengths: (n,) int64, their tokens.
        length: Steps and tokens of the run, for people.
        course: Which rows each step takes.
        mixture: How they were mixed, or None.
    """

    recipe: Recipe
    data: PreparedData
    lengths: np.ndarray
    length: RunLength
    course: Course
    mixture: Mixture | None = None


def settle(recipe: Recipe, data: PreparedData, *, processes: int = 1) -> Settled:
    """Settles a run.

    Args:
        recipe: What is trained.
        data: Its prepared rows.
        processes: Devices that train at once.

    Raises:
        DataError: A stage has no rows.
        RecipeError: The parts of the schedule do not go into the run.
    """
    if recipe.data.mixture is not None:
        return _settle_mixture(recipe, data, processes)
    lengths = row_lengths(data.train_rows)
    tokens = int(lengths.sum())
    length = run_length(recipe, rows=len(lengths), tokens=tokens, processes=processes, lengths=lengths)
    recipe = with_accumulation(recipe, length.accumulation)
    course = plan_course(recipe.train, lengths, seed=recipe.seed, processes=processes)
    return Settled(recipe, data, lengths, length, course)


def _settle_mixture(recipe: Recipe, data: PreparedData, processes: int) -> Settled:
    train, packs = recipe.train, recipe.data.packing
    rows = len(data.pieces.length)
    if packs and recipe.data.max_length is not None:
        rows = math.ceil(int(data.pieces.length.sum()) / recipe.data.max_length)  # about as many
    batches = math.ceil(rows / (train.per_device_train_batch_size * processes))
    recipe = with_accumulation(recipe, accumulation := settled_accumulation(train, batches, processes))
    mixture = plan_mixture(recipe, data.pieces, processes=processes)
    course, read = mixture.course, int(mixture.course.tokens.sum())
    length = length_of_steps(
        train, course.tokens, rows=len(mixture.counts), tokens=read, epochs=1.0, processes=processes,
        accumulation=accumulation, read=read,
    )  # fmt: skip
    trained = (
        put_together(data.train, mixture.pieces, mixture.counts)
        if packs
        else data.train.select(mixture.pieces)
    )
    return Settled(recipe, replace(data, train_rows=trained), mixture.lengths, length, course, mixture)
