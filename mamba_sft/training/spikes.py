"""Steps whose loss or gradient is far outside of what was usual just before, and the rows they were made of.

Usual is the median of the last steps, and far is measured in their median absolute deviation, scaled so that
for normal noise it is the standard deviation: one step, however wild, moves neither. A course that has really
changed is usual again once half of the window has seen it.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from accelerate.utils import gather_object

from mamba_sft.errors import TrainingError
from mamba_sft.run import Run, write_atomically
from mamba_sft.training.saving import left_out_if_refused
from mamba_sft.wording import count_text, path_text

logger = logging.getLogger(__name__)

WINDOW = 64
"""Steps that say what is usual."""
LEAST = 16
"""Steps that there must be of them, before anything is called unusual."""
FAR = 6.0
"""Deviations above the median from which on a value is a spike."""
FLOOR = 0.1
"""The least deviation, as a share of the median: where all steps are alike, a little more is no spike."""
_NAMED = 3


@dataclass(frozen=True)
class Spike:
    """A step that was far off.

    Args:
        step: Which.
        what: `loss` or `gradient norm`.
        value: What it was.
        usual: The median of the steps before.
        skipped: Whether the weights were left as they were.
        rows: Where the step's rows came from, those of the micro-batch with the highest loss first.
    """

    step: int
    what: str
    value: float
    usual: float
    skipped: bool
    rows: list[str]


class SpikeWatch:
    """Looks at each optimizer step's loss and gradient norm, before the weights are changed.

    Args:
        run: Its `spikes.jsonl` has every spike with all its rows.
        on_spike: The recipe's `train.on_spike`.
    """

    def __init__(self, run: Run, on_spike: Literal["warn", "skip", "stop"]):
        self.run = run
        self.on_spike = on_spike
        self.found: list[Spike] = []
        self._recent: dict[str, deque[float]] = {}

    def skips(self, step: int, values: dict[str, float], micro_batches: Sequence[tuple[float, Any]]) -> bool:
        """Returns whether the step is to be left out; takes its values as part of what is usual.

        Args:
            step: The optimizer step.
            values: Loss and gradient norm of it, the same in every process.
            micro_batches: Loss and origins of each micro-batch of this process.

        Raises:
            TrainingError: It is a spike, and the recipe says stop.
        """
        far = [(what, value, usual) for what, value in values.items() if (usual := self._usual(what, value))]
        if not far:
            return False
        what, value, usual = far[0]
        skipped = self.on_spike == "skip"
        rows = [row for _, row in sorted(gather_object(_origins(micro_batches)), key=lambda each: -each[0])]
        self.found.append(Spike(step, what, value, usual, skipped, rows))
        self.write()
        text = f"the {what} of step {step} is {value:.3g}, where {usual:.3g} is usual; {named(rows)}"
        if self.on_spike == "stop":
            raise TrainingError(
                text,
                hint=f"all its rows are in `{self.run.spikes}`; mend them, or go on without such steps: "
                "`--resume train.on_spike=skip`",
            )
        left_out = "; the step is left out" if skipped else ""
        place = f"; all of them are in `{path_text(self.run.spikes)}`" if len(rows) > _NAMED else ""
        logger.warning("%s%s%s", text, left_out, place)
        return skipped

    def write(self) -> None:
        """Writes the spikes of the run, where there are any; after a resume, those before it alone."""
        if self.found or self.run.spikes.exists():
            text = "".join(json.dumps(asdict(spike), ensure_ascii=False) + "\n" for spike in self.found)
            with left_out_if_refused(self.run.spikes):
                write_atomically(self.run.spikes, text)

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run has to know, as JSON can hold it."""
        recent = {what: list(values) for what, values in self._recent.items()}
        return {"recent": recent, "found": [asdict(spike) for spike in self.found]}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._recent = {what: deque(values, WINDOW) for what, values in state["recent"].items()}
        self.found = [Spike(**spike) for spike in state["found"]]

    def _usual(self, what: str, value: float) -> float | None:
        """The usual value, where this one is far above it."""
        if not math.isfinite(value):  # of float16, whose scaler leaves such a step out by itself
            return None
        recent = self._recent.setdefault(what, deque(maxlen=WINDOW))
        middle, far = 0.0, False
        if len(recent) >= LEAST:
            middle = median(recent)
            deviation = 1.4826 * median(abs(each - middle) for each in recent)
            far = value - middle > FAR * max(deviation, FLOOR * abs(middle))
        recent.append(value)
        return middle if far else None


def named(rows: Sequence[str]) -> str:
    """Returns rows by their origins, as a message names them: the first few, and how many more there are."""
    if not rows:
        return "where its rows came from is not known"
    more = f" and {count_text(len(rows) - _NAMED, 'more row')}" if len(rows) > _NAMED else ""
    here = f"{Path.cwd()}/"
    return "its rows: " + ", ".join(f"`{row.removeprefix(here)}`" for row in rows[:_NAMED]) + more


def _origins(micro_batches: Sequence[tuple[float, Any]]) -> list[tuple[float, str]]:
    return [(loss, row) for loss, where in micro_batches for rows in where for row in rows]
