"""What the course of the loss says of a run: whether it ended well above where it began."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

RISEN = 1.2
"""Times the loss at the beginning, from which on a loss at the end is no noise."""
_FIRST, _SHARE, _MOST = 3, 5, 20


def risen_loss(metrics: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Returns the training loss at the beginning and at the end if it rose well above, else None.

    Medians of up to three logged steps and of the last fifth, up to twenty: one odd step says nothing.

    Args:
        metrics: The lines of metrics.jsonl.
    """
    losses = [float(line["loss"]) for line in metrics if "loss" in line]
    if len(losses) < 2:
        return None
    count = max(1, min(_MOST, len(losses) // _SHARE))
    first, last = median(losses[: min(count, _FIRST)]), median(losses[-count:])
    return (first, last) if last > RISEN * first else None


def loss_warnings(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """Returns what a reader should know of the loss, with the field to change on a line to paste."""
    risen = risen_loss(metrics)
    if risen is None:
        return []
    text = f"the training loss ended at {risen[1]:.3g}, well above the {risen[0]:.3g} where it began"
    rate = max((line["learning_rate"] for line in metrics if "learning_rate" in line), default=0.0)
    fix = f"; a lower rate is the first thing to try:\ntrain.learning_rate={rate / 10:.2g}"
    return [text + fix if rate else text]
