"""What happens around the trainer's steps: metrics on disk, a way out on Ctrl-C, an adapter that learns."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mamba_sft.errors import AdapterError
from mamba_sft.model.adapter import dead_adapters, own_gradient
from mamba_sft.model.full_weights import dead_weights
from mamba_sft.processes import is_one_of_many
from mamba_sft.run import write_atomically
from mamba_sft.training.saving import Lines
from mamba_sft.wording import count_text

logger = logging.getLogger(__name__)

ECHO_SECONDS = 2.0
"""After a signal to one of many processes, how long another one is the same."""


class MetricsLog(TrainerCallback):
    """Appends every logged dictionary to `metrics.jsonl`, with its step.

    A resumed run begins with the lines that had been logged when its resume point was saved. Those after
    them describe lost work; one that is missing or cut off is written again from the trainer's record.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines = Lines(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Brings the log to what it was at the step that training starts from."""
        if not state.is_world_process_zero:
            return
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        there = text.splitlines() + [""] * len(state.log_history)
        kept = [
            line if _holds(line, logged) else _line(logged)
            for line, logged in zip(there, state.log_history, strict=False)
        ]
        write_atomically(self.path, "".join(line + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Appends one line."""
        if state.is_world_process_zero and logs:
            self.lines.append(_line({"step": state.global_step, "epoch": state.epoch, **logs}))


def _line(logged: dict[str, Any]) -> str:
    return json.dumps({"step": logged["step"], "epoch": logged.get("epoch"), **logged})


def _holds(line: str, logged: dict[str, Any]) -> bool:
    """Whether a line of the log is, or at least holds, what the trainer recorded."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and logged.items() <= found.items()


class AdapterWatch(TrainerCallback):
    """Stops the run when part of the adapter, or of the model where all weights are trained, cannot learn.

    A kernel that reads a projection's weight around the adapter, or a target nothing flows through, trains
    nothing without a word. The first steps are watched: `dead_adapters` says which tensors should have had a
    gradient and had none, and a tensor it names twice ends the run. (Once may be a batch without a trained
    token; and LoRA's A has no gradient until B, which starts at zero, has moved.) Every process looks, since
    none may have a gradient as a whole.

    Args:
        gradient_of: Returns a parameter's whole gradient, or None where it has none.
    """

    STEPS = 4

    def __init__(self, gradient_of: Callable[[Tensor], Tensor | None] = own_gradient) -> None:
        self.gradient_of = gradient_of
        self.suspects: set[str] = set()
        self.checked = 0

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Looks at the gradients that the optimizer is about to use."""
        if self.checked >= self.STEPS:
            return
        by_itself = self.gradient_of is own_gradient
        if by_itself and all(p.grad is None for p in model.parameters()):  # left out by `train.on_spike`
            return
        self.checked += 1
        adapted = hasattr(model, "peft_config")
        found = set(
            dead_adapters(model, self.gradient_of) if adapted else dead_weights(model, self.gradient_of)
        )
        dead = sorted(self.suspects & found)
        self.suspects |= found
        if dead:
            names = "\n".join(f"  {name}" for name in dead)
            raise AdapterError(
                f"no gradient reaches {count_text(len(dead), 'tensor')} of the "
                f"{'adapter' if adapted else 'model'}, so that nothing is learned there:\n{names}",
                hint="remove them from `adapter.target_modules`, or report this as a bug with the recipe"
                if adapted
                else "report this as a bug with the recipe",
            )


class StepGivenUp(Exception):  # noqa: N818
    """The user stopped the run, and the step (or evaluation) in progress takes too long to be waited for."""


class Interruption(TrainerCallback):
    """Turns the first Ctrl-C (or SIGTERM) into a resume point and a clean stop; a second one stops at once.

    The step in progress has half of the time that there is, and its end is where the run stops. After that it
    is given up (`is_late`), and the run stops where it was before it; the other half is for saving. Outside
    of training the first signal stops at once too, since there is nothing to save.

    One of many processes may get a signal twice: Slurm sends it to all of a job, and torchrun passes it on.

    Args:
        grace_seconds: How long after the signal the resume point has to be there.
    """

    def __init__(self, grace_seconds: float):
        self.grace_seconds = grace_seconds
        self.requested = False
        self.agreed: bool | None = None
        """What several processes know of each other's requests, of the same step; None with one process."""
        self.where = "stopped before training"
        self.step: int | None = None
        self._training = False
        self._late_at = math.inf
        self._same_until = -math.inf
        self._echo = ECHO_SECONDS if is_one_of_many() else 0.0

    @property
    def is_late(self) -> bool:
        """Whether the step in progress can no longer be waited for."""
        return self.requested and time.monotonic() > self._late_at

    @property
    def ends_the_run(self) -> bool:
        """Whether this step is the last one, for all processes."""
        return self.requested if self.agreed is None else self.agreed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From now on there is something to save."""
        self._training = True
        self._see(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Saves and stops after the step in which the signal came."""
        self._see(state)
        if self.ends_the_run:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All is saved that a signal could ask for."""
        self._training = False

    def _see(self, state: TrainerState) -> None:
        self.step = state.global_step
        self.where = f"stopped at step {state.global_step} of {state.max_steps}"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block; outside the main thread it changes nothing.

        Raises:
            KeyboardInterrupt: In the block, to stop at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now < self._same_until:
            return
        self._same_until = now + self._echo
        if self.requested or not self._training:
            raise KeyboardInterrupt
        self.requested = True
        self._late_at = now + self.grace_seconds / 2
        logger.warning("stopping after this step and saving a checkpoint; once more stops at once")
