"""The training bar: step, loss, tokens/s and time left; plain lines where there is no terminal."""

from __future__ import annotations

import time
from copy import copy
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mamba_sft.wording import time_text

PLAIN_LINES = 20


class TrainingBar(TrainerCallback):
    """Draws the progress of a run on `console`; without a terminal, about twenty plain lines.

    Tokens are the real ones (padding not counted), the clock runs only while a step does: validation and
    checkpoints do not lower tokens/s.
    """

    shows_progress = True
    """To the trainer: its own bar is not needed."""

    def __init__(self, console: Console):
        self.console = console
        self.bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("[cyan]{task.fields[validation]}"),
            TextColumn("[green]{task.fields[rate]}"),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self.task: TaskID | None = None
        self.loss, self.validation = "-", ""
        self.step_started = self.begun = self.seconds = 0.0
        self.first_step = 0
        self.tokens: float | None = None
        self.counted = 0.0
        self._due: TrainerState | None = None
        self._answers: StageBar | None = None

    def on_sample_answer(self, when: str, done: int, total: int) -> None:
        """Shows how many of the sample prompts are answered."""
        if self._answers is None:
            self._answers = StageBar(self.console)
            self._answers.bar.start()
        self._answers.update("answers", done, total, name=f"answers {when} training")
        if done == total:
            self._end_answers()

    def _end_answers(self) -> None:
        if self._answers is not None:
            self._answers.bar.stop()
            self._answers = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the bar at the step training goes on from."""
        self.first_step, self.begun = state.global_step, time.monotonic()
        self.task = self.bar.add_task(
            "train", total=state.max_steps, completed=state.global_step, loss="-", validation="", rate=""
        )
        if state.is_world_process_zero:
            self.bar.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock of one step; by now the last one was validated, if it was to be."""
        self._print_due()
        self.step_started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops the clock and moves the bar."""
        self.seconds += time.monotonic() - self.step_started
        self._draw(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes the newest losses and token count."""
        logs = logs or {}
        if "eval_loss" in logs:
            self.validation = f"val {logs['eval_loss']:.3f}"
        if "loss" in logs:
            self.loss = f"{logs['loss']:.3f}"
            self._count(logs.get("num_tokens"))
        self._draw(state)
        every = max(1, state.max_steps // PLAIN_LINES)
        due = state.global_step % every == 0 or state.global_step == state.max_steps
        if "loss" in logs and due and state.is_world_process_zero and not self.console.is_terminal:
            self._due = copy(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the bar, leaving its last state on the screen."""
        self.close()

    def close(self) -> None:
        """Ends the bar; also when training stopped by an exception."""
        self._print_due()
        self._end_answers()
        self.bar.stop()

    def _count(self, tokens: float | None) -> None:
        """Adds the tokens since the last log; the first only sets the mark: its step compiles kernels."""
        if tokens is None:
            return
        if self.tokens is None:
            self.seconds = 0.0
        else:
            self.counted += tokens - self.tokens
        self.tokens = tokens

    @property
    def rate(self) -> str:
        """Real tokens per second so far."""
        return f"{self.counted / self.seconds:,.0f} tokens/s" if self.counted and self.seconds else ""

    def _draw(self, state: TrainerState) -> None:
        if self.task is not None:
            self.bar.update(
                self.task,
                completed=state.global_step,
                loss=self.loss,
                validation=self.validation,
                rate=self.rate,
            )

    def _print_due(self) -> None:
        """Prints the line of the last step, with the validation loss that came after it."""
        state, self._due = self._due, None
        if state is None:
            return
        done = max(1, state.global_step - self.first_step)
        left = (time.monotonic() - self.begun) / done * (state.max_steps - state.global_step)
        parts = [
            f"step {state.global_step}/{state.max_steps}",
            f"loss {self.loss}",
            self.validation,
            self.rate,
        ]
        self.console.print(
            "  ".join(part for part in [*parts, f"{time_text(left)} left"] if part), highlight=False
        )


class StageBar:
    """A bar for work in stages, each with a total of its own: merging bytes, then checking layers.

    Args:
        console: Where it is drawn; nothing is where there is no terminal.
    """

    def __init__(self, console: Console):
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=32),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StageBar:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, stage: str, done: int, total: int, name: str | None = None) -> None:
        """Shows that `done` of `total` is behind us; `name` stands there instead of the stage's own."""
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=total)
        self.bar.update(self.tasks[stage], completed=done, total=total, description=name or stage)

    def count(self, number: int, answer: object) -> None:
        """Counts one more answer; how many there will be is not known here."""
        if "answers" not in self.tasks:
            self.tasks["answers"] = self.bar.add_task("answers", total=None)
        self.bar.advance(self.tasks["answers"])


class TaskBar:
    """Two bars for work in many tasks, all of them and the present one; elsewhere a line for each that ends.

    Args:
        bar: What draws them.
        total: How many tasks there are.
    """

    def __init__(self, bar: StageBar, total: int):
        self.bar = bar
        self.total = total
        self.name = ""
        self.begun = self.done = 0

    def update(self, name: str, done: int, total: int) -> None:
        """Shows how far a task is; another name, or fewer than before, is the next task."""
        if name != self.name or done < self.done:
            self.end()
            self.name, self.begun = name, self.begun + 1
        self.done = done
        self.bar.update("tasks", max(0, self.begun - 1), self.total)
        self.bar.update("task", done, total, name=name)

    def end(self) -> None:
        """The present task has ended."""
        console = self.bar.bar.console
        if self.name and not console.is_terminal:
            console.print(f"{self.begun}/{self.total}  {self.name}", highlight=False)
        if self.name:
            self.bar.update("tasks", self.begun, self.total)
        self.name, self.done = "", 0
