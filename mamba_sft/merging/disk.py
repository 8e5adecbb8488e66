"""Room on a disk: asked about before something large is written, explained where it runs out all the same."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mamba_sft.errors import MambaSFTError
from mamba_sft.wording import size_text

_SPARE = 64 << 20  # tokenizer, configs, and room for the filesystem
_MAKE_ROOM = "free some space, or give a directory on another disk with `--output`"


def require_space(
    output: Path, nbytes: int, what: str, kind: type[MambaSFTError], hint: str = _MAKE_ROOM
) -> None:
    """Checks that the disk of a path, which need not exist yet, has room.

    Args:
        output: What is to be written.
        nbytes: Its size.
        what: Its name in the message, with its verb: `the merged model takes`.
        kind: What is raised.
        hint: What to do about it.

    Raises:
        MambaSFTError: It has not.
    """
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.is_dir())
    free, needed = shutil.disk_usage(place).free, nbytes + _SPARE
    if free < needed:
        raise kind(f"{what} {size_text(needed)}; `{place}` has {size_text(free)} left", hint=hint)


@contextmanager
def disk_errors_explained(output: Path, need: str, kind: type[MambaSFTError]) -> Iterator[None]:
    """Turns what a disk can refuse, inside the block, into errors that say so.

    Args:
        output: Where the block writes.
        need: What it needs, e.g. `the merged model takes 14.5 GB`.
        kind: What is raised.

    Raises:
        MambaSFTError: The disk is full, or may not be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise kind(f"the disk of `{output}` is full: {need}", hint=_MAKE_ROOM) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise kind(f"cannot write to `{output}`: {error.strerror}") from error
        raise
