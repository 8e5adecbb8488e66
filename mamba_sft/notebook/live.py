"""A run while it trains: one bar, and the loss as a drawing that grows, in one output of the cell."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mamba_sft.evaluation.run_facts import RunFacts
from mamba_sft.evaluation.run_figures import loss_curves
from mamba_sft.notebook.cell import Output
from mamba_sft.notebook.markup import Block, Markup, Text, View
from mamba_sft.notebook.plots import loss_drawing
from mamba_sft.run import Run
from mamba_sft.wording import size_text, time_text

EVERY = 1.0
"""Seconds between two drawings, at least: a browser draws them all, and a slow line carries them."""


class LiveTraining(TrainerCallback):
    """Shows step, losses, speed, memory and time left, and the loss so far.

    Args:
        run: What is trained.
        warnings: What deserves a look before training, shown above the bar.
    """

    shows_progress = True
    """To the trainer: its own bar is not needed."""

    def __init__(self, run: Run, warnings: Sequence[str] = ()):
        self.run = run
        self.warnings = warnings
        self.output = Output()
        self.latest: dict[str, Any] = {}
        self._begun = self._drawn = 0.0
        self._first = 0
        self._state: TrainerState | None = None
        self._answers: tuple[str, int, int] | None = None

    def on_sample_answer(self, when: str, done: int, total: int) -> None:
        """Shows how many of the sample prompts are answered."""
        self._answers = (when, done, total) if done < total else None
        if time.monotonic() - self._drawn >= EVERY or done == total:
            self._draw(self._state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the bar at the step that training goes on from."""
        self._begun, self._first = time.monotonic(), state.global_step
        self._draw(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the bar, unless it moved just now."""
        if time.monotonic() - self._drawn >= EVERY:
            self._draw(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes the newest figures."""
        self.latest |= logs or {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the last state, which stays in the notebook."""
        self._draw(state)

    def _draw(self, state: TrainerState | None) -> None:
        self._state = state
        shown = self.view(state)
        self.output.show(shown.html(), shown.text())
        self._drawn = time.monotonic()

    def view(self, state: TrainerState | None) -> View:
        """What is shown of a state of the trainer; before training there is none."""
        title = f"training {self.run.path}"
        answers = self._answer_blocks()
        if state is None:
            return View(title, [*(Text(warning, "note") for warning in self.warnings), *answers])
        step, steps = state.global_step, max(1, state.max_steps)
        line = " · ".join([f"step {step:,} of {steps:,}", *self._figures(step, steps)])
        facts = RunFacts(self.run, metrics=[one for one in state.log_history if "step" in one])
        blocks: list[Block] = [Text(warning, "note") for warning in self.warnings]
        blocks += [
            bar(step / steps),
            Text(line),
            loss_drawing(loss_curves(facts), "loss over steps", height=200),
            *answers,
        ]
        return View(title, blocks)

    def _answer_blocks(self) -> list[Block]:
        if self._answers is None:
            return []
        when, done, total = self._answers
        return [Text(f"sample prompts answered {when} training: {done:,} of {total:,}"), bar(done / total)]

    def _figures(self, step: int, steps: int) -> list[str]:
        found, latest = [], self.latest
        for name, told in (("loss", "loss"), ("eval_loss", "validation loss")):
            if name in latest:
                found.append(f"{told} {latest[name]:.3f}")
        if "tokens_per_second" in latest:
            found.append(f"{latest['tokens_per_second']:,.0f} tokens/s")
        if "peak_memory" in latest:
            found.append(f"peak memory {size_text(latest['peak_memory'])}")
        spent, done = time.monotonic() - self._begun, step - self._first
        if step >= steps:
            found.append(f"took {time_text(spent)}")
        elif done:
            found.append(f"{time_text(spent / done * (steps - step))} left")
        return found


def bar(share: float) -> Markup:
    """Returns a bar that is full to a share of it."""
    percent = f"{100 * min(1.0, max(0.0, share)):.1f}%"
    return Markup(
        f'<div class="track"><div class="fill" style="width:{percent}"></div></div>', f"  {percent}"
    )
