"""What a run takes in each step, over the tokens that it read: learning rate, batch, and length of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mamba_sft.errors import UsageError
from mamba_sft.planning.course import Course
from mamba_sft.planning.extent import sizes_without_rows
from mamba_sft.planning.mixture import last_step
from mamba_sft.planning.schedule import learning_rates
from mamba_sft.recipe.recipe import Recipe


@dataclass(frozen=True)
class Curves:
    """Each step of a run.

    Args:
        rates: (S,) float64, learning rates.
        sizes: (S,) int64, rows of the global batch.
        tokens: (S,) int64, tokens that each step reads.
        estimated: Whether rows of `data.max_length` stand for rows that are not here.
    """

    rates: np.ndarray
    sizes: np.ndarray
    tokens: np.ndarray
    estimated: bool

    @property
    def lengths(self) -> np.ndarray:
        """(S,) float64, tokens of a row, in the mean of each step."""
        lengths: np.ndarray = self.tokens / self.sizes
        return lengths

    @property
    def read(self) -> np.ndarray:
        """(S + 1,) int64: step s reads the tokens from `read[s]` to `read[s + 1]` of the run."""
        return np.concatenate([[0], np.cumsum(self.tokens)])

    def to_dict(self) -> dict[str, Any]:
        """Returns the arrays as lists, one value a step."""
        return {
            "learning_rate": self.rates.tolist(),
            "batch_size": self.sizes.tolist(),
            "tokens": self.tokens.tolist(),
            "row_length": self.lengths.tolist(),
            "estimated": self.estimated,
        }


def run_curves(recipe: Recipe, course: Course | None) -> Curves:
    """Returns each step of a run on one device, from the rows where they are on this machine.

    Elsewhere the rows are taken to have `data.max_length` tokens, which packed ones nearly have.

    Args:
        recipe: What would be trained.
        course: Of its plan; None where the rows are not here.

    Raises:
        UsageError: The rows are not here, and the recipe does not say how many steps there are, or how long
            the rows.
        RecipeError: The parts of the schedule do not go into the run.
    """
    if course is not None:
        sizes, tokens = course.sizes, course.tokens
    else:
        _refuse_unknown(recipe)
        sizes = sizes_without_rows(recipe)
        tokens = sizes * _lengths_without_rows(recipe)
    return Curves(learning_rates(recipe.train, tokens), sizes, tokens, estimated=course is None)


def _lengths_without_rows(recipe: Recipe) -> np.ndarray:
    """(S,) the longest row of each step: that of its stage."""
    longest, steps = recipe.data.max_length or 1, recipe.train.max_steps
    lengths = np.full(steps, longest, dtype=np.int64)
    start = 0
    for stage in recipe.train.stages or []:
        end = last_step(stage, steps)
        lengths[start:end] = stage.max_length or longest
        start = end
    return lengths


def _refuse_unknown(recipe: Recipe) -> None:
    missing = []
    if recipe.train.max_steps <= 0:
        missing.append("train.max_steps=1000")
    if recipe.data.max_length is None:
        missing.append("data.max_length=2048")
    if missing:
        raise UsageError(
            "base or data are not on this machine, so there are no rows to plot the steps of",
            hint=f"say what they come to, such as `{' '.join(missing)}`, or use files that are here",
        )
