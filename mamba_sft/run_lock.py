"""One writer in a directory: `train`, `merge` and `export` hold its lock for as long as they write.

The lock is a file that is made only if it is not there (`O_EXCL`), which is one step on local disks and, from
NFS version 3 on, on network ones; `flock`, which many of those ignore or refuse, is not relied on. It names
its process. Whether that still runs can be asked on its own host only, so there a lock that a killed process
left is taken over, and anywhere else it is the user's to remove.

Two processes that find the same dead lock must not both take its place, so none removes it: a successor first
makes a file named by what it succeeds, again only if it is not there, looks at the lock again, and renames
its file over it. Nobody else may replace that very lock meanwhile, and the lock is there at every moment.
Making that file also has a client of a network disk ask for the directory anew, not go by what it remembers.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mamba_sft.disk import reason, sync
from mamba_sft.errors import LockedError
from mamba_sft.processes import Process
from mamba_sft.run import Run, remove_leftovers
from mamba_sft.run_contents import is_marked

logger = logging.getLogger(__name__)

PATIENCE = 3.0
"""Seconds to wait for a lock that is being written, or taken over, at this moment."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Args:
        verb: What it is doing: `train`, `merge`, `export`.
        host: Its host's name.
        pid: Its process id there.
        started: When it took the lock, as people read it.
        process: `Process.name`, by which one can tell whether it still runs.
        token: Tells this lock from any other.
    """

    verb: str
    host: str
    pid: int
    started: str
    process: str
    token: str

    @classmethod
    def own(cls, verb: str) -> Holder:
        """Returns this process, about to take a lock."""
        process = Process.own()
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return cls(verb, socket.gethostname(), process.pid, started, process.name, secrets.token_hex(4))

    @classmethod
    def read(cls, file: Path) -> Holder | None:
        """Returns whose lock a file is; None where there is none, or none that can be read."""
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            holder = cls(**content)
            texts = "".join((holder.verb, holder.host, holder.started, holder.process))
            is_one = type(holder.pid) is int and holder.pid > 0  # `kill -1` is said to nobody
            known = is_one and texts and re.fullmatch("[0-9a-f]{8}", holder.token)
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        return holder if known else None

    @property
    def runs(self) -> bool | None:
        """Whether it still runs; None where that cannot be seen from here."""
        process = Process.from_name(self.process)
        return process.runs if process else None

    def refusal(self, directory: Path, file: Path) -> LockedError:
        """What somebody else is told who wants to write into the directory."""
        hint = f"wait until it is done, or stop it: `kill {self.pid}`"
        if self.runs is None:
            hint = (
                "from here nobody can see whether that process still runs; if it does not, remove its lock: "
                f"`rm {shlex.quote(str(file))}`"
            )
        return LockedError(
            f"`{directory}` is being written by `mamba-sft {self.verb}`: process {self.pid} on `{self.host}`,"
            f" since {self.started}",
            hint=hint,
        )


def refuse_if_held(file: Path, directory: Path) -> None:
    """Looks whether somebody is writing, without writing anything.

    Raises:
        LockedError: Somebody is, or may be.
    """
    holder = Holder.read(file)
    if holder is not None and holder.runs is not False:
        raise holder.refusal(directory, file)


@contextmanager
def hold_run(run: Run, verb: str) -> Iterator[None]:
    """Holds the lock of a run while the block writes into it. The directory is made if it is not there.

    Raises:
        LockedError: Another process holds it, or none can be made there.
    """
    with _held(run.lock, run.path, verb):
        yield


@contextmanager
def hold_output(output: Path, verb: str, run: Run | None = None, *, replaced: bool = True) -> Iterator[None]:
    """Holds the lock of the place that a block writes to.

    Inside a run that is the run's. Elsewhere it is a file beside the directory, which is replaced as a whole;
    where files are added to it and nothing can be written beside it, a file in it.

    Args:
        output: The directory.
        verb: What is being done.
        run: The run that it may be inside of; others are found.
        replaced: Whether the directory is replaced as a whole.

    Raises:
        LockedError: Another process holds it, or none can be made there.
    """
    place = output.resolve()
    around = [run] if run is not None and place.is_relative_to(run.path.resolve()) else []
    around += [Run(path) for path in (place, *place.parents) if is_marked(Run(path))]
    file = place.with_name(f".{place.name}.lock") if place.name else place / ".lock"
    if not replaced and not os.access(_existing(place.parent), os.W_OK):
        file = place / ".lock"
    with _held(around[0].lock if around else file, around[0].path if around else output, verb):
        yield


@contextmanager
def _held(file: Path, directory: Path, verb: str) -> Iterator[None]:
    own = Holder.own(verb)
    made = [place for place in (file.parent, *file.parent.parents) if not place.exists()]
    try:
        try:
            earlier = _take(file, own, directory)
            _clear_successors(file)
        except OSError as error:
            raise _unwritable(directory, error) from error
        if earlier is not None:
            logger.warning(
                "took over the lock of `%s`: process %d on `%s`, `mamba-sft %s` since %s, no longer runs",
                directory, earlier.pid, earlier.host, earlier.verb, earlier.started,
            )  # fmt: skip
        for place in (directory, Run(directory).export):
            remove_leftovers(place, locked=True)
        try:
            yield
        finally:
            if own.pid == os.getpid() and Holder.read(file) == own:
                with suppress(OSError):
                    file.unlink()
    finally:
        for place in made:  # nothing stays of a directory that nothing was written into
            with suppress(OSError):
                place.rmdir()


def _take(file: Path, own: Holder, directory: Path) -> Holder | None:
    """Makes the lock `own`; returns whose place it took, if the one who held it no longer runs."""
    until = time.monotonic() + PATIENCE
    while not _create(file, own):
        holder = Holder.read(file)
        refusal = LockedError(
            f"`{directory}` has a lock that cannot be read: `{file}`",
            hint=f"if nothing is writing there, remove it: `rm {shlex.quote(str(file))}`",
        )
        if not os.path.lexists(file):  # as in /proc, where no file can be made
            refusal = LockedError(f"no file can be made in `{file.parent}`", hint="choose another directory")
        if holder is not None and holder.runs is not False:
            raise holder.refusal(directory, file)
        if holder is not None:
            try:
                if _succeed(file, own, holder, directory):
                    return holder
            except LockedError as error:  # another is taking over, and has the lock in a moment
                refusal = error
        if time.monotonic() > until:
            raise refusal
        time.sleep(0.02)
    return None


def _succeed(file: Path, own: Holder, dead: Holder, directory: Path) -> bool:
    """Takes the place of a holder that no longer runs; says whether it did. Only one can be at it."""
    successor = file.with_name(f"{file.name}.{dead.token}")
    _take(successor, own, directory)
    if Holder.read(file) != dead:
        successor.unlink(missing_ok=True)
        return False
    os.replace(successor, file)
    return True


def _clear_successors(file: Path) -> None:
    """Removes what is left by processes that were killed while they took a lock over: that lock is gone."""
    for entry in list(os.scandir(file.parent)):
        holder = Holder.read(Path(entry.path)) if entry.name.startswith(f"{file.name}.") else None
        if holder is not None and holder.runs is False:
            Path(entry.path).unlink(missing_ok=True)


def _create(file: Path, own: Holder) -> bool:
    """Makes a lock file if there is none; says whether it did."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except (FileExistsError, FileNotFoundError):  # or another has just removed the directory, which it made
        if file.parent.exists() and not file.parent.is_dir():
            raise
        return False
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(own)) + "\n")
            stream.flush()
            sync(handle)
    except OSError:
        file.unlink(missing_ok=True)
        raise
    return True


def _existing(place: Path) -> Path:
    return next(path for path in (place, *place.parents) if path.exists())


def _unwritable(directory: Path, error: OSError) -> LockedError:
    return LockedError(
        f"cannot write into `{directory}`: {reason(error, directory)}",
        hint="choose a directory that can be written to, with room on its disk",
    )
