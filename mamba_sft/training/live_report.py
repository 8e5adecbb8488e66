"""The report of a run, written while it runs: a page that can be left open, and never the end of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mamba_sft.evaluation.report import write_report
from mamba_sft.evaluation.run_figures import Progress
from mamba_sft.run import Run
from mamba_sft.wording import first_line

logger = logging.getLogger(__name__)

EVERY = 10.0
"""Seconds between two writes, at least."""
SHARE = 0.02
"""Of the run's time that writing may take: a run of very many logged steps writes less often."""


class LiveReport(TrainerCallback):
    """Writes the report at every log, though not more often than every ten seconds.

    It goes after the callback that writes metrics.jsonl, from which the report is made.

    Args:
        run: Whose report.
        steps: Optimizer steps of the whole run, for a report before the first.
        writes: Whether this process does; one of several is enough.
    """

    def __init__(self, run: Run, steps: int, *, writes: bool = True):
        self.run = run
        self._progress = Progress(0, steps)
        self._writes = writes
        self._warned = False
        self._next = 0.0
        self._begun, self._first = time.monotonic(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the first one, of what is known before the first step."""
        self._begun, self._first = time.monotonic(), state.global_step
        self._progress = Progress(state.global_step, state.max_steps)
        self._write()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes it anew when it is time."""
        left = None
        if (done := state.global_step - self._first) > 0:
            left = (time.monotonic() - self._begun) / done * (state.max_steps - state.global_step)
        self._progress = Progress(state.global_step, state.max_steps, left)
        if time.monotonic() >= self._next:
            self._write()

    @contextmanager
    def telling_the_end(self) -> Iterator[None]:
        """When an exception leaves the block, in which the run runs, the page says that it no longer does."""
        try:
            yield
        except BaseException as error:
            done = self._progress
            self._progress = Progress(done.step, done.steps, ended=f"ended early: {first_line(error)}")
            self._write()
            raise

    def finish(self) -> None:
        """Writes the report of the finished run."""
        self._progress = Progress(self._progress.steps, self._progress.steps)
        self._write(finished=True)

    def _write(self, *, finished: bool = False) -> None:
        if not self._writes:
            return
        started = time.monotonic()
        try:
            write_report(self.run, None if finished else self._progress)
        except OSError as error:
            self._warn(f"the report of `{self.run.path}` cannot be written: {error.strerror or error}")
        except Exception:  # a bug in a report must not cost anybody a run; its traceback is kept
            self._warn(f"the report of `{self.run.path}` cannot be made; this is a bug", traceback=True)
        now = time.monotonic()
        self._next = now + max(EVERY, (now - started) / SHARE)

    def _warn(self, text: str, *, traceback: bool = False) -> None:
        if not self._warned:
            later = "nothing else of the run depends on it, and `mamba-sft report` writes it later"
            logger.warning("%s; %s", text, later, exc_info=traceback)
        self._warned = True
