"""The training bar: step, loss, tokens/s and time left, on one line that stays readable in a log file."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LINES_WITHOUT_TERMINAL = 20


class TrainingBar(TrainerCallback):
    """Draws the progress of a run on `console`; without a terminal, about twenty plain lines."""

    def __init__(self, console: Console):
        self.console = console
        self.bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[validation]}"),
            TextColumn("[green]{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeftColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None
        self.loss = self.validation = ""
        self.started = self.tokens = self.tokens_at_start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the bar at the step training goes on from."""
        self.started = time.monotonic()
        self.task = self.bar.add_task(
            "train",
            total=state.max_steps,
            completed=state.global_step,
            loss="-",
            validation="",
            rate="- tokens/s",
        )
        if state.is_world_process_zero:
            self.bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes the newest loss and token count."""
        logs = logs or {}
        if "loss" in logs:
            self.loss = f"{logs['loss']:.3f}"
        if "eval_loss" in logs:
            self.validation = f"validation {logs['eval_loss']:.3f}"
        if "num_tokens" in logs:
            if not self.tokens:
                self.tokens_at_start, self.started = logs["num_tokens"], time.monotonic()
            self.tokens = logs["num_tokens"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the bar."""
        if self.task is None or not state.is_world_process_zero:
            return
        seconds = time.monotonic() - self.started
        tokens = self.tokens - self.tokens_at_start
        rate = f"{tokens / seconds:,.0f} tokens/s" if tokens and seconds else "- tokens/s"
        self.bar.update(
            self.task,
            completed=state.global_step,
            loss=self.loss or "-",
            validation=self.validation,
            rate=rate,
        )
        every = max(1, state.max_steps // LINES_WITHOUT_TERMINAL)
        if not self.console.is_terminal and (
            state.global_step % every == 0 or state.global_step == state.max_steps
        ):
            left = seconds / max(1, state.global_step) * (state.max_steps - state.global_step)
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  loss {self.loss or '-'}  {self.validation}"
                f"  {rate}  {left:.0f} s left",
                highlight=False,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the bar, leaving its last state on the screen."""
        self.bar.stop()

    def close(self) -> None:
        """Ends the bar when training stopped by an exception."""
        self.bar.stop()
