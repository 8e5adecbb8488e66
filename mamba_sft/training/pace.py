"""How fast a run goes and what it takes: measured on the host, which waits for the device no more often.

The trainer waits once in an optimizer step anyway, to read the gradient's norm; so the time from the begin of
a step to its end is the device's time too.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mamba_sft.processes import peak_rss


class Pace(TrainerCallback):
    """Adds up time, tokens and rows of optimizer steps until somebody logs them.

    The clock runs only while a step does: validation, checkpoints and sample answers slow nothing down.
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._step_rows = self._step_at_once = 0
        self._forget()

    def _forget(self) -> None:
        self.unlogged = 0.0, 0, 0, 0, 0

    @property
    def unlogged(self) -> tuple[float, int, int, int, int]:
        """Seconds, steps, tokens, rows, and rows at once, since the last line that was logged."""
        return self._seconds, self._steps, self._tokens, self._rows, self._at_once

    @unlogged.setter
    def unlogged(self, values: tuple[float, int, int, int, int]) -> None:
        self._seconds, self._steps, self._tokens, self._rows, self._at_once = values

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock, and forgets a step that was given up."""
        self._step_rows = self._step_at_once = 0
        self._started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops it, and takes the step."""
        self._rows += self._step_rows
        self._at_once = max(self._at_once, self._step_at_once)
        self._seconds += time.monotonic() - self._started
        self._steps += 1

    def count_rows(self, rows: int, parts: int) -> None:
        """Takes a micro-batch of this process.

        Args:
            rows: How many it has.
            parts: In how many it went through the model.
        """
        self._step_rows += rows
        self._step_at_once = max(self._step_at_once, -(-rows // parts))

    def count_tokens(self, tokens: int) -> None:
        """Takes the tokens that a step of all processes read."""
        self._tokens += tokens

    def collect(self, device: torch.device, processes: int) -> dict[str, float]:
        """Returns figures of the steps since the last time, by the names they have in metrics.jsonl.

        Args:
            device: Whose memory is told; the process's own where it is the host.
            processes: How many take the same step.
        """
        if not self._steps:
            return {}
        figures = {
            "seconds_per_step": self._seconds / self._steps,
            "tokens_per_step": self._tokens / self._steps,
            "rows_per_step": self._rows * processes / self._steps,
            "rows_at_once": float(self._at_once),
            "peak_memory": peak_memory(device),
        }
        if self._seconds:
            figures["tokens_per_second"] = self._tokens / self._seconds
        self._forget()
        return figures


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done all that it was given; a CPU has, always."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """Returns the most bytes in use so far: by tensors on a GPU, or by this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))  # the allocator's own count: no wait
    return float(peak_rss())
