"""Files that may be packed, opened in one way: gzip, bzip2 and xz by Python, Zstandard by pyarrow."""

from __future__ import annotations

import io
import lzma
import zlib
from bz2 import BZ2File
from collections.abc import Callable
from gzip import GzipFile
from pathlib import Path
from typing import IO, cast

CANNOT_READ = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a file raises that is not there, ends early, or is not packed as its name says."""


def _open_zstandard(path: Path) -> IO[bytes]:
    import pyarrow as pa

    return cast(IO[bytes], io.BufferedReader(pa.input_stream(str(path), compression="zstd")))


def _open_xz(path: Path) -> IO[bytes]:
    """Opens an xz file, once its header is known not to ask for more memory than any real one does."""
    with path.open("rb") as file:
        lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(file.read(1024), max_length=1)
    return cast(IO[bytes], lzma.LZMAFile(path))


_XZ_MEMORY = 1 << 30
"""Bytes that unpacking may take: `xz -9` needs 65 MiB, and a header can ask for 4 GiB."""

_PACKED: dict[str, Callable[[Path], IO[bytes]]] = {
    ".gz": lambda path: cast(IO[bytes], GzipFile(path)),
    ".bz2": BZ2File,
    ".xz": _open_xz,
    ".zst": _open_zstandard,
}
PACKED = tuple(_PACKED)
"""The endings of packed files."""


def is_packed(path: Path) -> bool:
    """Returns whether a file's name says that it is packed."""
    return path.suffix.lower() in _PACKED


def kind_of_file(path: Path) -> str:
    """Returns the ending that says how a file is read: `.jsonl` of `chats.jsonl.gz`."""
    return Path(path.stem if is_packed(path) else path.name).suffix.lower()


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file to read bytes; a packed one is unpacked on the way.

    Raises:
        OSError: The file cannot be opened. Reading it may raise any of `CANNOT_READ`.
    """
    return _PACKED[path.suffix.lower()](path) if is_packed(path) else path.open("rb")
