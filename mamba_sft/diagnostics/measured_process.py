"""A measurement in a process of its own: its memory is its own, and it can be stopped."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from mamba_sft.errors import MambaSFTError

Fact = dict[str, Any]
Tell = Callable[[Fact], None]
"""Sends what was measured to the process that waits for it."""


class Moment(NamedTuple):
    """When something began: by the clock, and in processor time of this process."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> Moment:
        """Returns this moment."""
        return cls(time.perf_counter(), time.process_time())

    def facts(self, tokens: int, peak: float) -> Fact:
        """Returns what a step that began then took until now.

        Args:
            tokens: That it read.
            peak: The most bytes in use so far.
        """
        now = Moment.now()
        return {
            "seconds": now.wall - self.wall, "cpu_seconds": now.processor - self.processor,
            "tokens": tokens, "peak_bytes": int(peak),
        }  # fmt: skip


class MeasurementError(MambaSFTError):
    """A measurement whose process died, or that failed in a way that is no mistake of the user's."""


class TooLongError(Exception):
    """The time that a measurement was given is over."""


class NoMemoryError(MeasurementError):
    """A measurement took more memory than there is."""

    def __init__(self, what: str = "the measurement"):
        super().__init__(
            f"{what} took more memory than there is",
            hint="measure less at once: smaller batches, or shorter rows or prompts",
        )


def told_by(
    measure: Callable[..., None], *arguments: Any, what: str, seconds: float | None = None
) -> Iterator[Fact]:
    """Runs `measure(tell, *arguments)` in a new process and yields what it tells, as it comes.

    Args:
        measure: A function of a module; its first argument is `tell`.
        arguments: The others; they are sent to the process.
        what: What is measured, for messages.
        seconds: After the first thing it told, how long it may go on. None: as long as it takes.

    Raises:
        TooLongError: The time is over; the process was stopped.
        NoMemoryError: It took more memory than there is.
        MambaSFTError: What `measure` raised of these.
        MeasurementError: It raised something else, or its process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, measure, arguments), daemon=True)
    with _no_word_of_leaks():
        process.start()
    sender.close()  # so that the end of the process is the end of what can be received
    ends: float | None = None
    try:
        while True:
            if not receiver.poll(None if ends is None else max(0.0, ends - time.monotonic())):
                raise TooLongError
            kind, content = receiver.recv()
            if kind == "done":
                return
            if kind == "failed":
                raise content
            if kind == "no memory":
                raise NoMemoryError(what)
            if ends is None and seconds is not None:
                ends = time.monotonic() + seconds
            yield content
    except EOFError:
        process.join()
        if process.exitcode == -getattr(signal, "SIGKILL", 9):  # what Linux does to one that takes all memory
            raise NoMemoryError(what) from None
        raise MeasurementError(
            f"the process that measures {what} died with code {process.exitcode}"
        ) from None
    finally:
        receiver.close()
        if process.is_alive():
            process.kill()
        process.join()


@contextlib.contextmanager
def _no_word_of_leaks() -> Iterator[None]:
    """Has Python's tracker of shared resources say nothing of processes that were killed."""
    before = os.environ.get("PYTHONWARNINGS")
    ours = "ignore::UserWarning:multiprocessing.resource_tracker"
    os.environ["PYTHONWARNINGS"] = ours if before is None else f"{before},{ours}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _run(sender: Connection, measure: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """The process: quiet, since what it has to say is told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the one that waits, which then stops this
    _be_quiet()
    try:
        measure(lambda fact: sender.send(("fact", fact)), *arguments)
        last: tuple[str, Any] = ("done", None)
    except MambaSFTError as error:
        last = ("failed", error)
    except Exception as error:
        last = ("no memory", None) if _is_about_memory(error) else ("failed", _unexpected(error))
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        sender.send(last)


def _be_quiet() -> None:
    import warnings

    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:  # came with what measures
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    logging.getLogger("mamba_sft").setLevel(logging.ERROR)


def _is_about_memory(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or "allocate memory" in str(error)


def _unexpected(error: Exception) -> MeasurementError:
    lines = traceback.format_exception(error)
    return MeasurementError(f"the measurement failed:\n{''.join(lines).rstrip()}")
