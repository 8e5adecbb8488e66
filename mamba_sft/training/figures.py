"""What a micro-batch comes to: sums on the device, read when somebody must know them, and not before.

Loss and metrics are TRL's: log-probabilities of trained tokens, summed, and divided by the tokens of the
whole optimizer step. TRL (1.16.0, read 2026-11-27) reads its metrics after every micro-batch, and each time
the host waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mamba_sft.data.packing import PADDING
from mamba_sft.training.fused_head import Targets, send
from mamba_sft.training.streaming import Chunk


class Figures(NamedTuple):
    """Sums over some positions: what their loss and TRL's metrics are made of. Scalars, but for the last.

    `by_source` is (2 K,): the loss of each source, then the labels of each; K is 0 where nobody asks.
    """

    loss: Tensor
    labels: Tensor
    entropy: Tensor
    correct: Tensor
    by_source: Tensor

    @classmethod
    def of(cls, model: Any, chunk: Chunk, *, sources: int = 0, **more: Any) -> Figures:
        """Returns those of one forward.

        Args:
            model: With the fused head.
            chunk: Part of a batch, or all of it.
            sources: How many sources to tell apart.
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
            by_source=_by_source(outputs.log_probs.detach(), chunk, sources),
        )

    @classmethod
    def total(cls, parts: Iterable[Figures]) -> Figures:
        """Returns the sum of several."""
        return cls(*(sum(column[1:], column[0]) for column in zip(*parts, strict=True)))


def _by_source(log_probs: Tensor, chunk: Chunk, sources: int) -> Tensor:
    """(2 K,) float64: the loss of each source, then its labels, which the host counts."""
    if not sources:
        return log_probs.new_zeros(0, dtype=torch.float64)
    number = chunk.source.reshape(-1)[np.flatnonzero(chunk.trained)]
    labels = np.bincount(number, minlength=sources).astype(np.float64)
    sums = send(np.concatenate([np.zeros(sources), labels]), log_probs.device)
    return sums.index_add_(0, send(number.astype(np.int64), log_probs.device), -log_probs.double())


class Tally:
    """The figures of micro-batches that nobody has read yet, on the device.

    Args:
        accelerator: Over whose processes they are summed.
        sources: What the sources are called whose losses are told apart.
    """

    def __init__(self, accelerator: Any, sources: Sequence[str] = ()):
        self.sources = sources
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
        row = torch.stack([x.detach().double() for x in (*figures[1:4], tokens)])
        row = torch.cat([row, figures.by_source])
        state, process = self._accelerator.gradient_state, self._accelerator.process_index
        if state.end_of_dataloader and 0 < state.remainder <= process:
            row = torch.zeros_like(row)  # rows that only fill up the last batch of all processes
        self._rows[mode].append(row)

    @property
    def width(self) -> int:
        """Numbers that a micro-batch comes to: labels, entropy, correct, tokens, and two for each source."""
        return 4 + 2 * len(self.sources)

    def collect(self, mode: str) -> Tensor:
        """Returns sums of each micro-batch since the last time, of all processes: (n, width), on device."""
        rows, self._rows[mode] = self._rows[mode], []
        if not rows:
            return torch.zeros(0, self.width, dtype=torch.float64, device=self._accelerator.device)
        summed: Tensor = self._accelerator.reduce(torch.stack(rows), reduction="sum")
        return summed

    def metrics(self, mode: str, rows: list[list[float]]) -> dict[str, list[float]]:
        """Returns entropy, accuracy and losses of sources of each micro-batch, on the host.

        Args:
            mode: `train` or `eval`.
            rows: What `collect` returned.
        """
        if mode == "train":
            self.tokens += int(sum(row[3] for row in rows))
        return {
            "entropy": [row[1] / max(row[0], 1) for row in rows],
            "mean_token_accuracy": [row[2] / max(row[0], 1) for row in rows],
        } | dict(self._losses(rows))

    def _losses(self, rows: list[list[float]]) -> Iterator[tuple[str, list[float]]]:
        """`loss/SOURCE` of each micro-batch that has tokens of it, for each source that is in one."""
        for number, name in enumerate(self.sources, 4):
            labels = number + len(self.sources)
            if found := [row[number] / row[labels] for row in rows if row[labels]]:
                yield f"loss/{name}", found
