"""Out of memory is survived: a micro-batch that does not fit is run in parts, which changes no number.

The loss of a micro-batch is a sum over its rows divided by the tokens of the whole optimizer step, so its
parts, one after the other, give the same gradients. The order of the data and the effective batch stay what
they were. A batch of an evaluation, whose loss is a sum as well, is run in parts of its own number. The
longest rows are tried before the first step.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from mamba_sft.errors import TrainingError
from mamba_sft.training.random_state import current_random_state, restore_random_state

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
"""Tensors, and arrays of the host, whose first dimension is the rows."""

Result = TypeVar("Result")


class AutoBatch:
    """How many parts a batch is run in: one at first, doubled whenever memory runs out.

    Args:
        model: Whose gradients a failed attempt leaves as they were.
        effective_batch: Rows of an optimizer step, named in the line that is logged when memory ran out.
        processes: Where there are several, only `trial` may run out: later the others would wait for ever.
    """

    def __init__(self, model: torch.nn.Module, *, effective_batch: int, processes: int = 1):
        self.parts = self.evaluation_parts = 1
        self.effective_batch = effective_batch
        self.processes = processes
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run(
        self, batch: Batch, step: Callable[[Batch, bool], Result], *, trial: bool = False
    ) -> list[Result]:
        """Runs a micro-batch, in as many parts as it takes.

        Args:
            batch: Tensors (B, L).
            step: Forward and backward of some rows, adding to the gradients; told whether they are the last.
            trial: Take back everything but `parts`, and hold the memory that the optimizer will need.

        Returns:
            What `step` returned for each part.

        Raises:
            TrainingError: A single row does not fit, or memory ran out in one of several processes.
        """
        device = self._trained[0].device
        random, earlier = current_random_state(device), [parameter.grad for parameter in self._trained]
        apart = trial or self.processes == 1  # else the last backward averages what all micro-batches added
        while True:
            if apart:
                self._set_gradients([None] * len(earlier))
            results = self._attempt(batch, step, trial, self.parts)
            if trial or results is None:
                self._set_gradients(earlier)
                restore_random_state(random, device)
            if results is not None:
                break
            self._halve(batch, trial)
        if apart and not trial:
            self._add_gradients(earlier)
        return results

    def evaluate(self, batch: Batch, step: Callable[[Batch], Result], *, trial: bool = False) -> list[Result]:
        """Runs a batch of an evaluation, in as many parts as it takes.

        Processes exchange nothing in an evaluation's forward, so each finds its own number of parts.

        Args:
            batch: Tensors (B, L).
            step: Forward of some rows, without gradients.
            trial: Hold the memory that the optimizer will need.

        Returns:
            What `step` returned for each part.

        Raises:
            TrainingError: A single row does not fit.
        """
        while True:
            results = self._attempt(batch, lambda rows, last: step(rows), trial, self.evaluation_parts)
            if results is not None:
                return results
            size = _rows_at_once(batch, self.evaluation_parts)
            if size == 1:
                raise TrainingError(
                    f"the GPU is out of memory in the evaluation of one row of {_length(batch)} tokens",
                    hint="set `train.stream_tokens: 1024`, which evaluation follows too, lower "
                    "`data.max_length`, or use nf4",
                )
            self.evaluation_parts *= 2
            _say(batch, size, self.evaluation_parts, "an evaluation still reads every row")

    def _attempt(
        self, batch: Batch, step: Callable[[Batch, bool], Result], trial: bool, parts: int
    ) -> list[Result] | None:
        rows = len(next(iter(batch.values())))
        size = _rows_at_once(batch, parts)
        try:
            # Adam keeps two numbers for each trained one, from its first step on.
            held = [p.new_empty((2, *p.shape), dtype=torch.float32) for p in self._trained] if trial else []
            results = [
                step({name: x[start : start + size] for name, x in batch.items()}, start + size >= rows)
                for start in range(0, rows, size)
            ]
            del held
            return results
        except torch.OutOfMemoryError:
            pass  # and with the exception goes its traceback, which holds the activations
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _halve(self, batch: Batch, trial: bool) -> None:
        size = _rows_at_once(batch, self.parts)
        if size == 1 or (self.processes > 1 and not trial):
            raise TrainingError(
                f"the GPU is out of memory with {size} x {_length(batch)} tokens",
                hint="set `train.stream_tokens: 1024`, lower `data.max_length` or "
                "`train.per_device_train_batch_size`, or use nf4",
            )
        self.parts *= 2
        _say(batch, size, self.parts, f"an optimizer step still has {self.effective_batch}")

    def _set_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            parameter.grad = gradient

    def _add_gradients(self, earlier: list[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self._trained, earlier, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            elif gradient is not None:
                parameter.grad += gradient


def _rows_at_once(batch: Batch, parts: int) -> int:
    return -(-len(next(iter(batch.values()))) // parts)


def _length(batch: Batch) -> int:
    return int(next(iter(batch.values())).shape[1])


def _say(batch: Batch, size: int, parts: int, still: str) -> None:
    logger.warning(
        "out of memory with %d rows of %d tokens at once: going on with %d; %s",
        size,
        _length(batch),
        _rows_at_once(batch, parts),
        still,
    )
