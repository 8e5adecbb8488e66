"""How long a run is: rows, batches, optimizer steps, and whether so few steps can teach anything.

Where `train.gradient_accumulation_steps` is left out, it is settled here, from the rows: `DEFAULT`
micro-batches for an optimizer step, or as many fewer as it takes for `ENOUGH` steps.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_sft.planning.course import Course, estimated_sizes, plan_course
from mamba_sft.planning.schedule import find_phases
from mamba_sft.wording import count_text

if TYPE_CHECKING:
    from mamba_sft.recipe.fields import TrainSection
    from mamba_sft.recipe.recipe import Recipe

DEFAULT = 16
"""Micro-batches of an optimizer step where the recipe says nothing and there are rows enough."""
ENOUGH = 20
"""Optimizer steps below which a run is too short to learn much."""
_MOST_EPOCHS = 1000  # the bound of the recipe's field


@dataclass(frozen=True)
class RunLength:
    """What the rows and the recipe come to.

    Args:
        rows: Rows of an epoch as they are trained: packed where `data.packing` is on.
        tokens: Their tokens.
        batch_size: Rows of a micro-batch on one device.
        processes: Devices that train at once.
        accumulation: Micro-batches of an optimizer step; with a ramp, of those at its end.
        chosen: Whether `accumulation` was settled here, because the recipe leaves it out.
        epochs: Passes over the rows that the recipe asks for.
        max_steps: `train.max_steps`, which overrules them, or None.
        steps: Optimizer steps of the run.
        warmup: Those of the warm-up.
        ramp: With `train.batch_ramp`, the rows of the first step and of the last, over all devices.
        read: Tokens of the whole run, where they were counted step by step: with a ramp, or a part of the
            schedule in tokens.
    """

    rows: int
    tokens: int
    batch_size: int
    processes: int
    accumulation: int
    chosen: bool
    epochs: float
    max_steps: int | None
    steps: int
    warmup: int
    ramp: tuple[int, int] | None = None
    read: int | None = None

    @property
    def tokens_per_step(self) -> float:
        """Tokens of an optimizer step, in the mean."""
        if self.ramp is not None and self.read is not None:
            return self.read / self.steps
        return self.tokens / _steps_of_epoch(self.batches, self.accumulation)

    @property
    def batches(self) -> int:
        """Micro-batches of an epoch on one device."""
        return math.ceil(self.rows / (self.batch_size * self.processes))

    def warnings(self) -> list[str]:
        """What makes a run of this length learn little, each with what to change, on a line to paste."""
        found = []
        if self.steps < ENOUGH:
            found.append(f"{self._sum()}, too few to learn much; for {ENOUGH} or more:\n{self._longer()}")
        if 2 * self.warmup > max(2, self.steps):  # a share of one step is that step
            rising = min(self.warmup, self.steps)
            found.append(
                f"warm-up takes {rising:,} of {count_text(self.steps, 'step')}, most of the run: the "
                "learning rate hardly gets to its peak; for a tenth of the run:\ntrain.warmup_steps=0.1"
            )
        return found

    def _sum(self) -> str:
        if self.max_steps is not None:
            return f"`train.max_steps` allows {count_text(self.steps, 'step')}"
        epochs = f"{self.epochs:g} epoch" + ("s" if self.epochs != 1 else "")
        per_step = f"{self.tokens_per_step:,.0f} a step"
        return f"{self.tokens:,} tokens an epoch, {per_step}, {epochs}: {count_text(self.steps, 'step')}"

    def _longer(self) -> str:
        """Overrides that make at least `ENOUGH` steps, with as many tokens in each as that leaves."""
        if self.max_steps is not None:
            return f"train.max_steps={ENOUGH}"
        if self.ramp is not None:
            return self._longer_ramp(*self.ramp)
        size = self.batch_size
        if self.batches * self.epochs < ENOUGH:
            size = max(1, math.floor(self.rows * self.epochs / (ENOUGH * self.processes)))
            size = min(size, self.batch_size)
        batches = math.ceil(self.rows / (size * self.processes))
        epochs = self.epochs
        if batches * epochs < ENOUGH:
            epochs = min(_MOST_EPOCHS, math.ceil(ENOUGH / batches))
        accumulation = _accumulation_for(batches, epochs, self.accumulation)
        changes = {
            "per_device_train_batch_size": (self.batch_size, size),
            "gradient_accumulation_steps": (self.accumulation, accumulation),
            "num_train_epochs": (self.epochs, epochs),
        }
        return " ".join(f"train.{name}={new:g}" for name, (old, new) in changes.items() if new != old)

    def _longer_ramp(self, first: int, last: int) -> str:
        """The same for a batch that grows: never more rows in a step than make `ENOUGH` of them."""
        epochs = self.epochs
        if self.rows * epochs < ENOUGH:
            epochs = min(_MOST_EPOCHS, math.ceil(ENOUGH / self.rows))
        most = max(1, math.floor(self.rows * epochs / ENOUGH))
        changes = {
            "batch_ramp.from": (first, min(first, most)),
            "batch_ramp.to": (last, min(last, most)),
            "num_train_epochs": (self.epochs, epochs),
        }
        return " ".join(f"train.{name}={new:g}" for name, (old, new) in changes.items() if new != old)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON can hold it."""
        return asdict(self) | {"tokens_per_step": round(self.tokens_per_step), "warnings": self.warnings()}


def run_length(
    recipe: Recipe, *, rows: int, tokens: int, processes: int = 1, lengths: np.ndarray | None = None
) -> RunLength:
    """Returns the length of a run.

    Args:
        recipe: Its batch size, accumulation, ramp, epochs and schedule.
        rows: Rows of an epoch as they are trained.
        tokens: Their tokens.
        processes: Devices that train at once.
        lengths: (rows,) tokens of each row. A ramp, and parts of the schedule in tokens, are estimated
            without: with rows of the same length, or, where there are none either, of `data.max_length`.

    Raises:
        RecipeError: The parts of the schedule do not go into the run.
    """
    train = recipe.train
    batches = math.ceil(rows / (train.per_device_train_batch_size * processes))
    accumulation = settled_accumulation(train, batches, processes)
    read = None
    if train.batch_ramp is not None or _counts_tokens(train):
        if lengths is None and rows:
            lengths = np.full(rows, max(1, round(tokens / rows)))
        if lengths is None:
            by_step = sizes_without_rows(recipe, processes=processes) * (recipe.data.max_length or 1)
        else:
            by_step = course_of(recipe, lengths, processes=processes).tokens
        read = int(by_step.sum())
    else:
        steps = math.ceil(train.num_train_epochs * _steps_of_epoch(batches, accumulation))
        steps = train.max_steps if train.max_steps > 0 else steps
        by_step = np.zeros(steps, dtype=np.int64)  # only their number counts
    return length_of_steps(
        train, by_step, rows=rows, tokens=tokens, epochs=train.num_train_epochs, processes=processes,
        accumulation=accumulation, read=read,
    )  # fmt: skip


def length_of_steps(
    train: TrainSection,
    by_step: np.ndarray,
    *,
    rows: int,
    tokens: int,
    epochs: float,
    processes: int,
    accumulation: int,
    read: int | None,
) -> RunLength:
    """Returns the length of a run whose steps are known.

    Args:
        train: The recipe's `train`, its accumulation as the recipe has it.
        by_step: (S,) tokens that each step reads; where nothing counts them, anything.
        rows: As `RunLength` has it, and so all that follow.
        tokens: The same.
        epochs: The same.
        processes: The same.
        accumulation: The same.
        read: The same.

    Raises:
        RecipeError: The parts of the schedule do not go into the run.
    """
    return RunLength(
        rows=rows,
        tokens=tokens,
        batch_size=train.per_device_train_batch_size,
        processes=processes,
        accumulation=accumulation,
        chosen=train.gradient_accumulation_steps is None and train.batch_ramp is None,
        epochs=epochs,
        max_steps=train.max_steps if train.max_steps > 0 else None,
        steps=len(by_step),
        warmup=find_phases(train, by_step).warmup,
        ramp=(train.batch_ramp.from_, train.batch_ramp.to) if train.batch_ramp is not None else None,
        read=read,
    )


def course_of(recipe: Recipe, lengths: np.ndarray, *, processes: int = 1) -> Course:
    """Returns the course of a run, with an accumulation that is left out settled as `run_length` does.

    Args:
        recipe: What would be trained.
        lengths: (n,) tokens of each row.
        processes: Devices that train at once.
    """
    batches = math.ceil(len(lengths) / (recipe.train.per_device_train_batch_size * processes))
    train = with_accumulation(recipe, settled_accumulation(recipe.train, batches, processes)).train
    return plan_course(train, lengths, seed=recipe.seed, processes=processes)


def sizes_without_rows(recipe: Recipe, *, processes: int = 1) -> np.ndarray:
    """Returns the rows of each of `max_steps` steps, (S,) int64, estimated with rows of `data.max_length`."""
    train = with_accumulation(recipe, settled_accumulation(recipe.train, None, processes)).train
    return estimated_sizes(train, length=recipe.data.max_length or 1, processes=processes)


def _counts_tokens(train: TrainSection) -> bool:
    return any(isinstance(span, str) for span in (train.warmup_steps, train.stable_steps, train.decay_steps))


def settled_accumulation(train: TrainSection, batches: int | None, processes: int = 1) -> int:
    """Returns `gradient_accumulation_steps`, or what it comes to where it is left out.

    Args:
        train: The recipe's `train`.
        batches: Micro-batches of an epoch on one device; None where the rows are not known yet.
        processes: Devices that share the rows of a `batch_ramp` out.
    """
    if train.batch_ramp is not None:
        return math.ceil(train.batch_ramp.to / (train.per_device_train_batch_size * processes))
    if train.gradient_accumulation_steps is not None:
        return train.gradient_accumulation_steps
    if batches is None or train.max_steps > 0:
        return DEFAULT
    return _accumulation_for(batches, train.num_train_epochs, DEFAULT)


def with_accumulation(recipe: Recipe, accumulation: int) -> Recipe:
    """Returns the recipe with `train.gradient_accumulation_steps` written out, unless a ramp says it."""
    if recipe.train.batch_ramp is not None:
        return recipe
    train = recipe.train.model_copy(update={"gradient_accumulation_steps": accumulation})
    return recipe.model_copy(update={"train": train})


def _accumulation_for(batches: int, epochs: float, most: int) -> int:
    """The most micro-batches of a step, up to `most`, that leave `ENOUGH` steps; 1 where nothing does."""
    fitting = (n for n in range(most, 1, -1) if math.ceil(epochs * _steps_of_epoch(batches, n)) >= ENOUGH)
    return next(fitting, 1)


def _steps_of_epoch(batches: int, accumulation: int) -> int:
    return max(1, math.ceil(batches / accumulation))
