"""The course of a run: which rows each optimizer step takes, from the first step to the last.

It is settled before training starts, from the recipe and the lengths of the rows. So a step is known by its
number alone: any number of processes shares the same rows out, and a run goes on from any step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mamba_sft.recipe.fields import RampSection, TrainSection


@dataclass(frozen=True)
class Course:
    """What each optimizer step takes.

    Args:
        order: (T,) int64, the rows in the order in which they are read; a row is there once in every epoch.
        starts: (S + 1,) int64: step s, from 0, reads `order[starts[s]:starts[s + 1]]`.
        tokens: (S,) int64, tokens of each step.
        epochs: (S,) float64, passes over the rows that are done after each step.
    """

    order: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    epochs: np.ndarray

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.tokens)

    @property
    def sizes(self) -> np.ndarray:
        """(S,) rows of each step, over all processes."""
        return np.diff(self.starts)

    def rows(self, step: int) -> np.ndarray:
        """Returns the rows of a step, counted from 0."""
        return self.order[self.starts[step] : self.starts[step + 1]]


def plan_course(train: TrainSection, lengths: np.ndarray, *, seed: int, processes: int = 1) -> Course:
    """Returns the course of a run.

    An epoch reads every row once, in an order of its own, and ends with a step of what is left. The order is
    that of accelerate's `SeedableRandomSampler`: `torch.randperm` from the seed plus the number of the epoch.
    Of an epoch that `num_train_epochs` asks for in part, as large a part of its steps is taken; with a
    `batch_ramp`, whose steps differ, the fewest steps that read that part of the rows.

    Args:
        train: Batch size, accumulation (settled), `batch_ramp`, and `num_train_epochs` or `max_steps`.
        lengths: (n,) tokens of each row as it is trained.
        seed: The recipe's.
        processes: Processes that share a step's rows out.

    Raises:
        ValueError: There are no rows.
    """
    if not len(lengths):
        raise ValueError("a course needs rows")
    ramp, count = train.batch_ramp, len(lengths)
    same = train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1) * processes
    steps, rows_wanted = _end(train, count, same)
    order: list[np.ndarray] = []
    starts, tokens, epochs = [0], [], []
    read = 0  # tokens, before the step
    for epoch, rows in enumerate(_epochs(count, seed)):
        order.append(rows)
        before = np.concatenate([[0], np.cumsum(lengths[rows])])
        end = 0
        while end < count:
            size = same if ramp is None else ramped_size(ramp, read)
            start, end = end, min(count, end + size)
            tokens.append(int(before[end] - before[start]))
            starts.append(epoch * count + end)
            epochs.append(epoch + end / count)
            read += tokens[-1]
            if len(tokens) == steps or (steps is None and starts[-1] >= rows_wanted):
                taken = np.concatenate(order)[: starts[-1]]
                return Course(taken, np.array(starts), np.array(tokens), np.array(epochs))
    raise AssertionError("there are endlessly many epochs")


def estimated_sizes(train: TrainSection, *, length: int, processes: int = 1) -> np.ndarray:
    """Returns the rows of each of `max_steps` steps, (S,) int64, where the rows themselves are not known.

    Args:
        train: Batch size, accumulation (settled), `batch_ramp` and `max_steps`.
        length: Tokens that every row is taken to have.
        processes: Processes that share a step's rows out.
    """
    same = train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1) * processes
    if train.batch_ramp is None:
        return np.full(train.max_steps, same, dtype=np.int64)
    sizes, read = [], 0
    for _ in range(train.max_steps):
        sizes.append(ramped_size(train.batch_ramp, read))
        read += sizes[-1] * length
    return np.array(sizes, dtype=np.int64)


def ramped_size(ramp: RampSection, read: int) -> int:
    """Returns the rows of the global batch after some tokens: they grow evenly with what was read.

    b = from + (to - from) * min(1, read / tokens), rounded, halves up: Falcon-Mamba's ramp from 128 rows to
    2,048 over the first 50 GT (arXiv 2410.05355, and the model card). In whole numbers, so that it is the
    same everywhere.

    Args:
        ramp: The recipe's `train.batch_ramp`.
        read: Tokens that all steps before have read.
    """
    grown = (ramp.to - ramp.from_) * min(read, ramp.tokens)
    return ramp.from_ + (2 * grown + ramp.tokens) // (2 * ramp.tokens)


def _end(train: TrainSection, count: int, size: int) -> tuple[int | None, int]:
    """When a run ends: its steps; for a ramp over epochs None, and the rows that it reads at least."""
    if train.max_steps > 0:
        return train.max_steps, 0
    if train.batch_ramp is not None:
        return None, math.ceil(Fraction(str(train.num_train_epochs)) * count)
    return math.ceil(train.num_train_epochs * max(1, math.ceil(count / size))), 0


def _epochs(rows: int, seed: int) -> Iterator[np.ndarray]:
    import torch

    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed + epoch)
        yield torch.randperm(rows, generator=generator).numpy()
        epoch += 1
