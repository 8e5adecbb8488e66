"""The course of a run: which rows each optimizer step takes, from the first step to the last.

It is settled before training starts, from the recipe and the lengths of the rows. So a step is known by its
number alone: any number of processes shares the same rows out, and a run goes on from any step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mamba_sft.recipe.fields import TrainSection


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

    Args:
        train: Batch size, accumulation (settled), and `num_train_epochs` or `max_steps`.
        lengths: (n,) tokens of each row as it is trained.
        seed: The recipe's.
        processes: Processes that share a step's rows out.
    """
    size = train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1) * processes
    per_epoch = max(1, math.ceil(len(lengths) / size))
    steps = train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * per_epoch)
    order, starts, epochs = [], [0], []
    for epoch, rows in enumerate(_epochs(len(lengths), seed)):
        order.append(rows)
        for end in [*range(size, len(rows), size), len(rows)]:
            starts.append(epoch * len(rows) + end)
            epochs.append(epoch + end / len(rows))
            if len(epochs) == steps:
                read = np.concatenate(order)[: starts[-1]]
                tokens = np.add.reduceat(lengths[read], np.array(starts[:-1])).astype(np.int64)
                return Course(read, np.array(starts), tokens, np.array(epochs))
    raise AssertionError("there are endlessly many epochs")


def _epochs(rows: int, seed: int) -> Iterator[np.ndarray]:
    import torch

    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed + epoch)
        yield torch.randperm(rows, generator=generator).numpy()
        epoch += 1
