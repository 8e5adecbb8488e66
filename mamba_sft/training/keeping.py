"""The adapter (or model) at the end of a run, which it was for: kept in memory until it is somewhere."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mamba_sft.disk import error_number, nearest_directory, reason
from mamba_sft.errors import TrainingError
from mamba_sft.run import Run
from mamba_sft.training.resuming import newest_resume_point
from mamba_sft.training.saving import newest_text
from mamba_sft.wording import size_text, time_text

logger = logging.getLogger(__name__)

RETRY_SECONDS = 600.0
"""How long the adapter is tried again where nobody can be asked."""
RETRY_PAUSE = 10.0
"""Seconds between two tries."""


@dataclass(frozen=True)
class Unsaved:
    """The adapter, or the model, that a disk did not take, and that is in memory.

    Args:
        place: Where it was to go.
        nbytes: What it takes.
        free: What is left there, or None where that cannot be told.
        reason: Why it was not taken.
        what: Which of the two it is.
    """

    place: Path
    nbytes: int
    free: int | None
    reason: str
    what: str = "adapter"

    @property
    def text(self) -> str:
        """All of it in a sentence."""
        left = "" if self.free is None else f", and {self.free:,} are free"
        return (
            f"the {self.what} cannot be written to `{self.place}`: {self.reason}; "
            f"it takes {self.nbytes:,} bytes ({size_text(self.nbytes)}){left}"
        )


Ask = Callable[[Unsaved, float], Path | None]
"""Asks the user, for some seconds, and returns another directory for the adapter; None: try again.
Raises `KeyboardInterrupt` where it is given up, and `EOFError` where nobody can answer."""


def save_surely(
    write: Callable[[Path], None], run: Run, nbytes: int, ask: Ask | None, *, what: str = "adapter"
) -> Path:
    """Writes the adapter, or the model, of a run, however often and wherever it takes; returns where it is.

    Where somebody can be asked, until they give it up; else for `RETRY_SECONDS`. SIGTERM, which is the last
    word of a job that ends, and Ctrl-C where nobody can be asked, are a last try. A terminal that goes away
    is nobody any more.

    Args:
        write: Writes it to the path it is given, or raises and leaves nothing.
        run: The run, in which the first place is.
        nbytes: What it takes.
        ask: Asks the user.
        what: `adapter` or `model`, which is also what it is called in the run.

    Raises:
        TrainingError: It could not be written; what there is of the run on the disk is named.
    """
    place, until, last = run.path / what, None, False
    with _Patience() as patience:
        while True:
            try:
                write(place)
                return place
            except Exception as error:
                if error_number(error) is None:
                    raise
                unsaved = Unsaved(place, nbytes, _free(place), reason(error, place), what)
            if last or patience.ended or (until is not None and time.monotonic() > until):
                raise _not_saved(run, unsaved)
            if ask is None and until is None:
                until = time.monotonic() + RETRY_SECONDS
                logger.warning(
                    "%s. It is kept in memory and tried again for %s; free some space",
                    unsaved.text, time_text(RETRY_SECONDS),
                )  # fmt: skip
            try:
                with patience.waiting():
                    chosen = (ask or _sleep)(unsaved, RETRY_PAUSE)
                place = _new_name(chosen, run, what) if chosen is not None else place
            except (EOFError, OSError):
                ask = None
            except (KeyboardInterrupt, _EndedError):
                last = True


def _sleep(unsaved: Unsaved, seconds: float) -> None:
    """Asks nobody."""
    time.sleep(seconds)


def _new_name(directory: Path, run: Run, what: str) -> Path:
    """A name in a directory that nothing has: what is there is not this run's to replace."""
    names = (f"{run.path.resolve().name}-{what}{number}" for number in ("", *range(2, 1000)))
    free = (directory.expanduser() / name for name in names)
    return next(path for path in free if not os.path.lexists(path))


def _free(place: Path) -> int | None:
    with suppress(OSError, StopIteration):
        return shutil.disk_usage(nearest_directory(place.parent)).free
    return None


def _not_saved(run: Run, unsaved: Unsaved) -> TrainingError:
    kept = newest_resume_point(run)
    hint = "start anew on a disk with more room: `output_dir=...`"
    if kept is not None:
        hint = f"free {size_text(unsaved.nbytes)}, then go on with `{run.resume_command}`"
    return TrainingError(f"{unsaved.text}; {newest_text(run)}", hint=hint)


class _EndedError(Exception):
    """SIGTERM came while something was waited for."""


class _Patience:
    """Makes SIGTERM end a waiting, not a writing, and survives the terminal."""

    def __init__(self) -> None:
        self.ended = self._waits = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Patience:
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._end)
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The signal ends this block."""
        self._waits = True
        try:
            if self.ended:
                raise _EndedError
            yield
        finally:
            self._waits = False

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.ended = True
        if self._waits:
            raise _EndedError
