"""One bar for work in stages: merging bytes, checking layers, answering prompts."""

from __future__ import annotations

import time
from typing import Any

from mamba_sft.notebook.cell import Output
from mamba_sft.notebook.live import EVERY, bar
from mamba_sft.notebook.markup import Text, View
from mamba_sft.wording import time_text


class StageBar:
    """Shows which stage the work is in and how far; nothing outside of notebooks.

    Args:
        title: What is done.
        total: How many things there are to count, for `count`.
    """

    def __init__(self, title: str, total: int = 0):
        self.title = title
        self.total = total
        self.output = Output()
        self.done = 0
        self._begun = time.monotonic()
        self._drawn = 0.0
        self._stages: list[str] = []

    def update(self, stage: str, done: int, total: int) -> None:
        """Shows that `done` of `total` is behind us."""
        new = stage not in self._stages
        if new:
            self._stages.append(stage)
        if not new and done < total and time.monotonic() - self._drawn < EVERY:
            return
        self._drawn = time.monotonic()
        self._show(done / max(1, total), stage)

    def __enter__(self) -> StageBar:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None and self._stages:
            self._show(1.0, "done")

    def _show(self, share: float, stage: str) -> None:
        line = f"{stage} · {100 * share:.0f} % · {time_text(time.monotonic() - self._begun)}"
        shown = View(self.title, [bar(share), Text(line)])
        self.output.show(shown.html(), shown.text())

    def count(self, number: int, answer: Any) -> None:
        """Counts one more answer."""
        self.done += 1
        self.update("answers", self.done, self.total)
