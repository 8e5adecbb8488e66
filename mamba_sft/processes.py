"""Who this process is, so that another can tell later whether it still runs, and what it takes.

A process id alone does not say: ids are used again, and mean something else on another host or in another
container. So a process is named by where its id means something, the id, and when it was started.
"""

from __future__ import annotations

import hashlib
import os
import re
import resource
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Where torchrun and the kinds of MPI tell a process its number, in the order in which accelerate looks."""
_MACHINE_IDS = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_UNSEEN = "0" * 8  # the birth of a process that a system hides from other users
LAUNCHED = "MAMBA_SFT_LAUNCHED"
"""Set for the processes that `train --processes` starts: the command that started them."""
NAME = r"[0-9a-f]{8}-\d{1,9}-[0-9a-f]{8}"
"""What the name of a process looks like, as a regular expression."""


def is_first() -> bool:
    """Returns whether this is the first of the processes that work together, or the only one.

    Read from the environment, before torch and accelerate are loaded, which would say the same.
    """
    return _rank() in (None, 0)


def is_one_of_many() -> bool:
    """Returns whether a launcher, such as torchrun, started this process and gave it a number."""
    return _rank() is not None


def _rank() -> int | None:
    """The number that a launcher gave this process, None where there was none."""
    return next((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdecimal()), None)


@dataclass(frozen=True)
class Process:
    """A process on some host.

    Args:
        space: A digest of where its id means something: host and container.
        pid: Its id there.
        birth: A digest of when it was started: which boot of the host, and the clock since then.
    """

    space: str
    pid: int
    birth: str

    @classmethod
    def own(cls) -> Process:
        """Returns the process that asks."""
        return cls(_space(), os.getpid(), _birth(os.getpid()) or _UNSEEN)

    @classmethod
    def from_name(cls, name: str) -> Process | None:
        """Returns the process that has this name; None where it is no such name."""
        if re.fullmatch(NAME, name) is None:
            return None
        space, pid, birth = name.split("-")
        return cls(space, int(pid), birth)

    @property
    def name(self) -> str:
        """All of it in one word, for the names of files."""
        return f"{self.space}-{self.pid}-{self.birth}"

    @property
    def runs(self) -> bool | None:
        """Whether it still runs; None where that cannot be seen from here."""
        if self.space != _space():
            return None
        found = _birth(self.pid)
        return found is not None and (found == self.birth or _UNSEEN in (found, self.birth))


def peak_rss() -> int:
    """Returns the largest resident set of this process so far, in bytes."""
    try:  # getrusage also counts what the parent had before it started us
        if match := re.search(r"VmHWM:\s+(\d+) kB", (_PROC / "self/status").read_text(encoding="ascii")):
            return int(match[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _space() -> str:
    """Host and, on Linux, container. A host is known again after a boot by its machine id, if it has one."""
    machine = next((text for path in _MACHINE_IDS if (text := _read(path))), "") or _boot()
    try:
        container = os.readlink(_PROC / "self/ns/pid")
    except OSError:
        container = ""
    return _digest(socket.gethostname(), machine, container)


def _boot() -> str:
    return _read(_PROC / "sys/kernel/random/boot_id")


def _birth(pid: int) -> str | None:
    """When a process was started, as a digest; None where none of this id runs."""
    if not (_PROC / "self/stat").is_file():
        return _birth_by_psutil(pid)
    try:
        # The name in brackets may hold anything, so what follows the last bracket is read.
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return _UNSEEN if _exists(pid) else None
    state, ticks = fields[0].decode(), fields[19].decode()
    return None if state in "ZX" else _digest(_boot(), ticks)  # a zombie has ended; nobody asked how yet


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _birth_by_psutil(pid: int) -> str | None:
    import psutil  # type: ignore[import-untyped]

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else _digest(str(process.create_time()))
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return _UNSEEN


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
