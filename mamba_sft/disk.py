"""What a file system can refuse: tried before anything large is made, explained where it happens anyway.

Permissions and free space do not say whether a write will succeed: not even root writes to what is mounted
read-only, a quota ends on a disk that is half empty, and inodes run out where bytes are left. So a file is
really written, and room is really taken, both for a moment.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mamba_sft.errors import MambaSFTError
from mamba_sft.wording import size_text

_SPARE = 64 << 20  # tokenizer, configs, and room for the filesystem
_FILES = 256  # more than a run or an export makes at a time
PROBE = ".mamba-sft-"
"""How the name of a file begins that is there for a moment, to see whether one can be."""
_PROBE_BYTES = b"\x5a" * 65536
_MAKE_ROOM = "free some space, or give a directory on another disk with `--output`"
_ANOTHER = "give another directory with `--output`"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system answers where there is a place but no more room in it."""
_LONGEST_NAME = 255
"""Bytes, on all common file systems."""
_REASONS = {
    errno.EDQUOT: "your quota on its disk is used up",
    errno.EFBIG: "a file may not become that large there (see `ulimit -f`)",
    errno.EROFS: "its file system is read-only",
    errno.EACCES: "this user has no permission",
    errno.EPERM: "this is not permitted to this user",
    errno.ENAMETOOLONG: "the name is too long for its file system",
    errno.ELOOP: "its symbolic links go round in a circle",
    errno.ENOENT: "nothing can be made there (is it still mounted?)",
    errno.EIO: "its disk fails",
}
_OF_A_LIBRARY = re.compile(r"\(os error (\d+)\)")
_OF_TORCH = ("inline_container", "PytorchStreamWriter", "unexpected pos")


def error_number(error: BaseException) -> int | None:
    """Returns the system's number of an error that came from a file, whichever library raised it.

    safetensors and tokenizers have errors of their own with the number in their text; torch's has no number,
    and counts as `EIO`. None: it is an error of another kind.
    """
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, MambaSFTError):
        return None
    if found := _OF_A_LIBRARY.search(str(error)):
        return int(found[1])
    if isinstance(error, RuntimeError) and any(mark in str(error) for mark in _OF_TORCH):
        return errno.EIO
    return None


def check_writable(directory: Path, kind: type[MambaSFTError], hint: str = _ANOTHER) -> None:
    """Checks that files can be made below a directory, which need not exist yet, by making one.

    Nothing is left behind: what had to be made for it is removed.

    Args:
        directory: Where something is to be written.
        kind: What is raised.
        hint: What to do about it.

    Raises:
        MambaSFTError: They cannot, with the reason.
    """
    try:
        with _untouched(directory):
            _try(directory)
    except (OSError, ValueError) as error:  # ValueError: a name that no system takes
        raise kind(f"cannot write to `{directory}`: {reason(error, directory)}", hint=hint) from error


def require_space(
    output: Path, sizes: Sequence[int], what: str, kind: type[MambaSFTError], hint: str = _MAKE_ROOM
) -> None:
    """Checks that a path, which need not exist yet, can be written to, and that its disk has room.

    Args:
        output: What is to be written.
        sizes: The sizes of its files.
        what: Its name in the message, with its verb: `the merged model takes`.
        kind: What is raised.
        hint: What to do about it.

    Raises:
        MambaSFTError: It has not.
    """
    check_writable(output, kind)
    place = nearest_directory(output)
    free, needed = shutil.disk_usage(place).free, sum(sizes) + _SPARE
    if free < needed:
        raise kind(f"{what} {size_text(needed)}; `{place}` has {size_text(free)} left", hint=hint)
    with _untouched(place):
        number = _refusal(place, [*sizes, _SPARE])
    if number is not None:
        raise kind(
            f"{what} {size_text(needed)}, which `{place}` does not take: {_why(number, place)}", hint=hint
        )


@contextmanager
def disk_errors_explained(
    output: Path, need: str, kind: type[MambaSFTError], hint: str = _MAKE_ROOM
) -> Iterator[None]:
    """Turns what a file system can refuse, inside the block, into errors that say so.

    Args:
        output: Where the block writes.
        need: What it needs, e.g. `the merged model takes 13.5 GiB`.
        kind: What is raised.
        hint: What to do where there is no room.

    Raises:
        MambaSFTError: The disk is full, or may not be written to; or a file cannot be read.
    """
    try:
        yield
    except Exception as error:
        number = error_number(error)
        if number is None:
            raise
        if number == errno.ENOSPC:
            raise kind(f"the disk of `{output}` is full: {need}", hint=hint) from error
        if number in FULL:
            why = reason(error, output)
            raise kind(f"cannot write to `{output}`: {why}; {need}", hint=hint) from error
        named = _named(error, output)
        if named is not None:
            gone = number == errno.ENOENT and not os.path.lexists(named)
            raise kind(f"`{named}`: {'it is not there' if gone else reason(error, named)}") from error
        raise kind(f"cannot write to `{output}`: {reason(error, output)}") from error


def nearest_directory(path: Path) -> Path:
    """Returns the path, or the nearest directory above it that is there: whose disk it would be on."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


def reason(error: BaseException, path: Path) -> str:
    """Returns why a file system refused to write to a path, in words.

    Args:
        error: What it raised.
        path: What was to be written.
    """
    number = error_number(error)
    if number is None:
        return str(error)
    return _why(number, path) or getattr(error, "strerror", None) or str(error)


def _why(number: int, path: Path) -> str:
    if number in (errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EISDIR):
        for parent in reversed((path, *path.parents)):
            if os.path.lexists(parent) and not parent.is_dir():
                return _what_is(parent)
    if number == errno.ENOSPC:
        with suppress(OSError):
            if _lacks_inodes(path):
                return "its disk can hold hardly any more files (its inodes are used up)"
            return f"its disk is full ({size_text(shutil.disk_usage(nearest_directory(path)).free)} left)"
        return "its disk is full"
    return _REASONS.get(number, os.strerror(number))


def _what_is(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"`{path}` is a link to `{os.readlink(path)}`, which is not there"
    return f"`{path}` is a file" if path.is_file() else f"`{path}` is no directory"


def _named(error: BaseException, output: Path) -> Path | None:
    """The file that an error is about, where it is not in the output: what was read, not what was written."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str):
        return None
    place, path = os.path.abspath(output).rstrip(os.sep), os.path.abspath(name)
    inside = path.startswith(place) and path[len(place) :][:1] in ("", os.sep, ".")  # or in its `.partial`
    return None if inside else Path(name)


def _try(directory: Path) -> None:
    """Makes a directory, and a file of some bytes in it that are on the disk; takes away what it made."""
    missing = [path for path in (directory, *directory.parents) if not os.path.lexists(path)]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            made.append(path)
        with tempfile.NamedTemporaryFile(prefix=PROBE, dir=directory) as file:
            file.write(_PROBE_BYTES)
            file.flush()
            sync(file.fileno())
    finally:
        for path in reversed(made):
            with suppress(OSError):  # another process has begun to write there
                path.rmdir()


@contextmanager
def _untouched(directory: Path) -> Iterator[None]:
    """Leaves the nearest directory that exists with the times it had: nothing looks newer than it is."""
    there = next((path for path in (directory, *directory.absolute().parents) if os.path.isdir(path)), None)
    before = os.stat(there) if there is not None else None
    try:
        yield
    finally:
        if there is not None and before is not None:
            with suppress(OSError):
                os.utime(there, ns=(before.st_atime_ns, before.st_mtime_ns))


def sync(descriptor: int) -> None:
    """Waits until an open file, or the names in a directory, are on the disk.

    A network file system says only then that a quota is used up. Where there is nothing to wait for, it is
    no error.

    Raises:
        OSError: The disk does not take it.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # it has nothing to wait for
            raise


def sync_path(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk; see `sync`."""
    opened = os.open(path, os.O_RDONLY)
    try:
        sync(opened)
    finally:
        os.close(opened)


def sync_tree(directory: Path) -> None:
    """Waits until all that is in a directory is on the disk, whatever is above it; see `sync`."""
    for path in directory.rglob("*"):
        if not path.is_symlink():
            sync_path(path)
    sync_path(directory)


def _refusal(place: Path, sizes: Sequence[int]) -> int | None:
    """The number of the error with which a directory refuses files of some sizes; None where it takes them.

    Their blocks are taken without being written, which quotas count too, and given back at once. Where a
    system cannot do that, nothing is known, and None.
    """
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if _lacks_inodes(place):
        return errno.ENOSPC
    with ExitStack() as stack:
        for size in sizes:
            if allocate is None or not size:
                continue
            try:
                file = stack.enter_context(tempfile.TemporaryFile(dir=place))
            except OSError as error:
                return error.errno
            allocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
            if allocate(file.fileno(), 0, 0, size) != 0 and ctypes.get_errno() in FULL:
                return ctypes.get_errno()
    return None


def _lacks_inodes(place: Path) -> bool:
    """Whether only few more files fit, however small; many file systems have no such bound."""
    if not hasattr(os, "statvfs"):
        return False
    found = os.statvfs(nearest_directory(place))
    return found.f_files > 0 and found.f_favail < _FILES


def is_file_name(name: Any) -> bool:
    """Returns whether a value names a file of a directory, and none elsewhere.

    A link is a file of the directory, wherever it leads: the hub's cache consists of links, and who can make
    one here can read what it leads to. An index is text that anybody may have written.
    """
    plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:")
    return plain and name not in ("", ".", "..") and len(name.encode()) <= _LONGEST_NAME
