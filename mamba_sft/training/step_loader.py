"""The rows of one optimizer step at a time, shared out over the processes and cut into micro-batches.

`planning.course` says which rows a step takes. Because all of them come together, a batch that grows,
accumulation, micro-batches that do not fit and the number of trained tokens that a loss is divided by are
settled in one place, and a step is the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from mamba_sft.data.packing import PADDING, Collator
from mamba_sft.data.rows import IGNORED
from mamba_sft.planning.course import Course

Batch = dict[str, Any]
"""What the collator makes: tensors, and arrays of the host, whose first dimension is the rows."""

_NOTHING = -1
"""In the place of a row: a micro-batch that trains nothing."""


def load_steps(
    dataset: Dataset[Any], collator: Collator, course: Course, args: TrainingArguments
) -> DataLoader[list[Batch]]:
    """Returns a loader of one item for each optimizer step of the run: this process's micro-batches.

    Args:
        dataset: The training rows.
        collator: Makes a batch of rows.
        course: Which rows each step takes.
        args: The size of a micro-batch, how many processes there are, and the loader's own settings.
    """
    size = args.train_batch_size
    return DataLoader(
        _Rows(dataset),
        batch_sampler=StepRows(course, size, process=args.process_index, processes=args.world_size),
        collate_fn=partial(_micro_batches, collator, size),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )


class StepRows(Sampler[list[int]]):
    """This process's rows of each optimizer step.

    The rows of a step are cut into micro-batches, which are dealt out in turn: the first to process 0, the
    second to process 1, and so on. Where they do not come out even, the processes that have one less get one
    that trains nothing: all have to take part in what they do together.

    Args:
        course: Which rows each step takes.
        size: Rows of a micro-batch.
        process: The number of this process.
        processes: How many there are.
    """

    def __init__(self, course: Course, size: int, *, process: int = 0, processes: int = 1):
        self.course = course
        self.size = size
        self.process = process
        self.processes = processes

    def __len__(self) -> int:
        """Optimizer steps of the run."""
        return self.course.steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the rows of every step, from the first step on."""
        for step in range(self.course.steps):
            yield self.of(step)

    def of(self, step: int) -> list[int]:
        """Returns the rows of a step, counted from 0."""
        rows = self.course.rows(step)
        starts = range(0, len(rows), self.size)
        own = [rows[start : start + self.size] for start in starts[self.process :: self.processes]]
        lacking = -(-len(starts) // self.processes) - len(own)
        return [*np.concatenate([*own, np.full(lacking, _NOTHING, dtype=np.int64)]).tolist()]


class _Rows(Dataset[Any]):
    """Rows by their numbers, all of a step at once, with None where there is to be none."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, numbers: list[int]) -> list[Any]:
        rows = [number for number in numbers if number != _NOTHING]
        return [*self.dataset.__getitems__(rows), *[None] * (len(numbers) - len(rows))]


def _micro_batches(collator: Collator, size: int, rows: list[Any]) -> list[Batch]:
    real = [row for row in rows if row is not None]
    batches = [collator(real[start : start + size]) for start in range(0, len(real), size)]
    return batches + [_untrained(collator.pad_token_id) for _ in range(len(rows) - len(real))]


def _untrained(pad_token_id: int) -> Batch:
    """A micro-batch of padding, of which nothing is trained and which comes from nowhere."""
    where = np.empty(1, dtype=object)
    where[0] = ()
    return {
        "input_ids": torch.full((1, 1), pad_token_id),
        "labels": torch.full((1, 1), IGNORED),
        "seq_idx": torch.full((1, 1), PADDING, dtype=torch.int32),
        "trained": np.zeros((1, 1), dtype=bool),
        "source": np.zeros((1, 1), dtype=np.int32),
        "where": where,
    }


def count_rows(batch: Batch) -> int:
    """Returns how many rows of a micro-batch, still on the host, are rows, and not padding alone."""
    return int((batch["seq_idx"][:, 0] != PADDING).sum())
