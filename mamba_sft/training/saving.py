"""What a run writes while it trains, on a disk that does not take it: told, and no reason to stop training.

A checkpoint that cannot be written is removed, and the next save tries again. Lines of the metrics wait for
the next one. What a run can do without is warned of and left out.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from mamba_sft.disk import error_number, reason, require_space
from mamba_sft.errors import TrainingError
from mamba_sft.run import Run
from mamba_sft.training.resuming import newest_resume_point
from mamba_sft.wording import size_text

logger = logging.getLogger(__name__)

STOP_PAUSE = 1.0
"""Seconds between two tries of the last checkpoint of a run that is stopped."""
_GOES_ON = "Training goes on, the next save tries again"


class CheckpointSaves:
    """Saves the checkpoints of a run as far as its disk takes them.

    Args:
        run: The run.
        sizes: The sizes of a checkpoint's files, by plan.
    """

    def __init__(self, run: Run, sizes: list[int]):
        self.run = run
        self.sizes = sizes
        self.paused = False
        self._told = 0

    def save(self, trainer: Any, write: Callable[[], None]) -> None:
        """Saves a checkpoint; where the disk does not take it, removes what there is of it, and warns.

        The checkpoint of a run that is stopped is tried for half of its grace: it is the last. With several
        processes, which wait for each other while they save, it is tried once, and none of them begins where
        there is no room; what the disk refuses to one of them, later, is raised in all.

        Args:
            trainer: The trainer, whose state says the step.
            write: Writes the checkpoint.

        Raises:
            Exception: What `write` raises that is not about the disk.
        """
        step, best = trainer.state.global_step, trainer.state.best_model_checkpoint
        several = trainer.accelerator.num_processes > 1
        if several and (refused := self._refused(trainer.accelerator)):
            self._pause(step, refused, _GOES_ON)
            return
        stops = trainer.interruption.requested and not several
        until = time.monotonic() + (trainer.interruption.grace_seconds / 2 if stops else 0)
        while not self._saved(trainer, write) and time.monotonic() < until:
            time.sleep(STOP_PAUSE)
            trainer.state.best_model_checkpoint = best

    def _saved(self, trainer: Any, write: Callable[[], None]) -> bool:
        step, best = trainer.state.global_step, trainer.state.best_model_checkpoint
        try:
            write()
        except Exception as error:
            if error_number(error) is None:
                raise
            why = reason(error, self.run.checkpoints)  # before room is made by removing the half of it
            if trainer.accelerator.is_main_process:
                self._remove(step)
            last_is_best = trainer.control.should_training_stop and trainer.state.best_global_step == step
            trainer.state.best_model_checkpoint = None if last_is_best else best  # None: it stays in memory
            stop = trainer.interruption
            then = f"It is tried again for {stop.grace_seconds / 2:.0f} s" if stop.requested else _GOES_ON
            self._pause(step, f"cannot write to `{self.run.checkpoints}`: {why}", then)
            return False
        if self.paused:
            logger.info("checkpoints are written again: step %d is saved", step)
        self.paused, self._told = False, 0
        return True

    def _refused(self, accelerator: Any) -> str | None:
        """Why the disk would not take a checkpoint; every process gets the same answer."""
        found: list[str | None] = [None]
        if accelerator.is_main_process:
            try:
                require_space(self.run.checkpoints, self.sizes, "a checkpoint takes", TrainingError)
            except TrainingError as error:
                found = [error.message]
        broadcast_object_list(found)
        return found[0]

    def _remove(self, step: int) -> None:
        """Removes what there is of a checkpoint, unless it was complete before something else failed."""
        newest = newest_resume_point(self.run)
        for path in self.run.checkpoints.glob(f"checkpoint-{step}*"):
            if path.name.partition(".")[0] == f"checkpoint-{step}" and path != newest:
                shutil.rmtree(path, ignore_errors=True)

    def _pause(self, step: int, why: str, then: str) -> None:
        self.paused = True
        if step == self._told:
            return
        self._told = step
        logger.warning(
            "the checkpoint of step %d is not saved: %s; it takes %s. %s, and until then %s",
            step, why, size_text(sum(self.sizes)), then, newest_text(self.run),
        )  # fmt: skip


def newest_text(run: Run) -> str:
    """Returns what is on the disk of a run, as the end of a sentence."""
    kept = newest_resume_point(run)
    return f"the newest checkpoint is `{kept}`" if kept else "there is no checkpoint"


@contextmanager
def file_errors_explained(run: Run, current_step: Callable[[], int]) -> Iterator[None]:
    """Turns an error of a file, inside training, into one that says what there is to go on from.

    Args:
        run: The run.
        current_step: Returns the step that training is at.

    Raises:
        TrainingError: A file could not be read or written.
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed any more
        raise
    except Exception as error:
        if error_number(error) is None:
            raise
        name = getattr(error, "filename", None)
        path = Path(name) if isinstance(name, str) else run.path
        raise TrainingError(
            f"training stopped at step {current_step()}: `{path}`: {reason(error, path)}; {newest_text(run)}",
            hint=f"mend that, then go on with `{run.resume_command}`"
            if newest_resume_point(run)
            else "mend that, then start anew with `--overwrite`",
        ) from error


@contextmanager
def left_out_if_refused(path: Path) -> Iterator[None]:
    """Warns where the disk does not take a file that the run can do without.

    Args:
        path: The file that the block writes.
    """
    try:
        yield
    except Exception as error:
        if error_number(error) is None:
            raise
        logger.warning("`%s` is not written: %s", path, reason(error, path))


class Lines:
    """A file that grows line by line; lines that the disk does not take wait in memory for the next.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []

    def append(self, line: str) -> None:
        """Adds one line, after those that wait, or none of them: no line is ever cut off."""
        self.waiting.append(line + "\n")
        try:
            self._write("".join(self.waiting).encode())
        except OSError as error:
            if len(self.waiting) == 1:
                logger.warning(
                    "`%s` does not grow: %s; its lines wait in memory", self.path, reason(error, self.path)
                )
        else:
            self.waiting.clear()

    def _write(self, data: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(end)
                raise
