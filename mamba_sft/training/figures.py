"""What a micro-batch comes to: sums on the device, read when somebody must know them, and not before.

Loss and metrics are TRL's: log-probabilities of trained tokens, summed, and divided by the tokens of the
whole optimizer step. TRL (1.16.0, read 2026-11-27) reads its metrics after every micro-batch, and each time
the host waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_sft.data.packing import PADDING
from mamba_sft.training.fused_head import Targets
from mamba_sft.training.streaming import Chunk


class Figures(NamedTuple):
    """Sums over some positions: what their loss and TRL's metrics are made of. Scalars."""

    loss: Tensor
    labels: Tensor
    entropy: Tensor
    correct: Tensor

    @classmethod
    def of(cls, model: Any, chunk: Chunk, **more: Any) -> Figures:
        """Returns those of one forward.

        Args:
            model: With the fused head.
            chunk: Part of a batch, or all of it.
            more: What else the model takes.
        """
        targets = Targets.of(chunk.inputs["shift_labels"], chunk.trained)
        outputs = model(**chunk.read, targets=targets, **more)
        loss = -outputs.log_probs.sum()
        return cls(
            loss=loss,
            labels=torch.full_like(loss, len(targets.positions), dtype=torch.int64, requires_grad=False),
            entropy=outputs.entropy.detach().sum(),
            correct=outputs.is_top1.sum(),
        )

    @classmethod
    def total(cls, parts: Iterable[Figures]) -> Figures:
        """Returns the sum of several."""
        return cls(*(sum(column[1:], column[0]) for column in zip(*parts, strict=True)))


class Tally:
    """The figures of micro-batches that nobody has read yet, on the device.

    Args:
        accelerator: Over whose processes they are summed.
    """

    def __init__(self, accelerator: Any):
        self.tokens = 0
        """Tokens read in training, over all processes."""
        self._accelerator = accelerator
        self._rows: dict[str, list[Tensor]] = {"train": [], "eval": []}

    def add(self, mode: str, figures: Figures, inputs: dict[str, Tensor]) -> None:
        """Takes the figures of a micro-batch.

        Args:
            mode: `train` or `eval`.
            figures: Its sums.
            inputs: Its `seq_idx`, which says how many tokens it holds.
        """
        tokens = (inputs["seq_idx"] != PADDING).sum()
        row = torch.stack([x.detach().double() for x in (*figures[1:], tokens)])
        state, process = self._accelerator.gradient_state, self._accelerator.process_index
        if state.end_of_dataloader and 0 < state.remainder <= process:
            row = torch.zeros_like(row)  # rows that only fill up the last batch of all processes
        self._rows[mode].append(row)

    def collect(self, mode: str) -> Tensor:
        """Returns sums of each micro-batch since the last time, of all processes: (n, 4), on the device."""
        rows, self._rows[mode] = self._rows[mode], []
        if not rows:
            return torch.zeros(0, 4, dtype=torch.float64, device=self._accelerator.device)
        summed: Tensor = self._accelerator.reduce(torch.stack(rows), reduction="sum")
        return summed

    def metrics(self, mode: str, rows: list[list[float]]) -> dict[str, list[float]]:
        """Returns entropy and accuracy of each micro-batch, from what `collect` returned, on the host."""
        if mode == "train":
            self.tokens += int(sum(row[3] for row in rows))
        return {
            "entropy": [entropy / max(labels, 1) for labels, entropy, _, _ in rows],
            "mean_token_accuracy": [correct / max(labels, 1) for labels, _, correct, _ in rows],
        }
