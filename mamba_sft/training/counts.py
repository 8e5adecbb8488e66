"""What a run has come to, over all of its sessions: a session ends where the next one goes on from."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mamba_sft.training.resume_points import COUNTS


@dataclass(frozen=True)
class Session:
    """One process's part of a run, up to its end or to the resume point that the next one went on from.

    Args:
        device: What it ran on.
        first_step: The step it went on from.
        last_step: The step it came to.
        tokens: Read in training.
        train_seconds: In the trainer, evaluations included.
        seconds: In all: loading and answering too.
    """

    device: str
    first_step: int
    last_step: int
    tokens: int
    train_seconds: float
    seconds: float


class Counts:
    """Counts a run's time and tokens by sessions, from the moment it is made.

    Args:
        device: What this session runs on.
    """

    def __init__(self, device: str):
        self.earlier: list[Session] = []
        self.train_seconds: float | None = None
        """What training took in this session, once it has ended."""
        self._device = device
        self._started = self._train_started = time.monotonic()
        self._first_step = self._first_tokens = 0

    def begin(self, step: int, tokens: int, earlier: Sequence[Session] = ()) -> None:
        """Marks the start of training in this session, with what the run had come to before."""
        self.earlier = list(earlier)
        self._train_started = time.monotonic()
        self._first_step, self._first_tokens = step, tokens

    def steps(self, step: int) -> int:
        """Returns the steps that this session has taken."""
        return step - self._first_step

    def sessions(self, step: int, tokens: int) -> list[Session]:
        """Returns all sessions, the last one as it is now."""
        now = time.monotonic()
        trained = now - self._train_started if self.train_seconds is None else self.train_seconds
        return [
            *self.earlier,
            Session(
                device=self._device,
                first_step=self._first_step,
                last_step=step,
                tokens=tokens - self._first_tokens,
                train_seconds=round(trained, 3),
                seconds=round(now - self._started, 3),
            ),
        ]


def write_counts(directory: Path, sessions: Iterable[Session], **more: Any) -> None:
    """Writes sessions, and what else has to be taken up again, into a resume point."""
    record = {"sessions": [asdict(session) for session in sessions], **more}
    (directory / COUNTS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_counts(directory: Path) -> tuple[list[Session], dict[str, Any]]:
    """Returns what `write_counts` wrote; nothing where an earlier version saved the resume point."""
    path = directory / COUNTS
    if not path.is_file():
        return [], {}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return [Session(**session) for session in record.pop("sessions")], record


def mean_loss(history: Iterable[Mapping[str, Any]], unlogged: float, steps: int) -> float:
    """Returns the mean training loss over all steps of a run.

    Args:
        history: Logged lines; a `loss` is the mean since the one before.
        unlogged: The sum of the losses after the last of them.
        steps: All steps.
    """
    total, last = unlogged, 0
    for line in history:
        if "loss" in line:
            total += line["loss"] * (line["step"] - last)
            last = line["step"]
    return total / max(steps, 1)
