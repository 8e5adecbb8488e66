"""What a file holds that its name does not say: a page or a pointer that came in its place, or a packed file.

Such files come of downloads: a link to the page instead of the file, a clone without git-lfs, an ending that
was dropped. What reads them would speak of its own syntax, and plain text would be taken as it is.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from mamba_sft.packed_files import CANNOT_READ, is_packed, kind_of_file

_BEGINNING = 512
_PACKED = {b"\x1f\x8b\x08": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
"""How a packed file begins, and the ending that says so."""


class OtherFile(NamedTuple):
    """What a file is, as the end of `X is ...`, and what to do about it."""

    what: str
    hint: str


def other_file(path: Path) -> OtherFile | None:
    """Returns what a file is if it is not what its name says; None if nothing speaks against the name.

    A page is no surprise in a txt file, which may hold any text.
    """
    start = _beginning(path)
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return OtherFile(
            "a git-lfs pointer, not the file itself", "`git lfs pull` in its repository fetches the file"
        )
    page = re.match(rb"\s*<(!doctype html|html)\b", start.removeprefix(b"\xef\xbb\xbf"), re.IGNORECASE)
    if page and kind_of_file(path) not in (".txt", ".html", ".htm"):
        return OtherFile(
            "a web page, not the file itself",
            "fetch the file anew: on the hub its address has `/resolve/` where that of the page has `/blob/`",
        )
    if is_packed(path) or kind_of_file(path) == ".parquet":
        return None
    if ending := next((ending for magic, ending in _PACKED.items() if start.startswith(magic)), None):
        return OtherFile(f"packed, and its name does not end in `{ending}`", _moved(path, path.name + ending))
    if start.startswith(b"PAR1") and len(start) > len(b"PAR1"):
        return OtherFile("a parquet file", _moved(path, path.stem + ".parquet"))
    if start.startswith(b"PK\x03\x04"):
        return OtherFile("a zip archive", shlex.join(["unzip", str(path)]))
    return None


def _beginning(path: Path) -> bytes:
    """The first bytes of a file; none of what can be read only once, as a pipe, or cannot be read."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(_BEGINNING)
    except CANNOT_READ:
        return b""


def fetching(address: str) -> str:
    """Returns the command that fetches a file from the web, under its own name."""
    return shlex.join(["curl", "-LO", address])


def _moved(path: Path, name: str) -> str:
    return shlex.join(["mv", str(path), str(path.with_name(name))])
