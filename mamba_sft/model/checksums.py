"""Checksums of a checkpoint's tensors: recorded once, compared wherever the tensors are read again.

A shard that lost a bit on a disk or in a copy looks like any other. The digest of every tensor is written
down when it is known to be good (of the base when it was trained on, of a merge while it is written), and a
reader that has gone through a whole tensor knows whether it is still the same. XXH3 is faster than any disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from mamba_sft.errors import ModelError
from mamba_sft.model.checkpoint import read_tensors
from mamba_sft.model.tensor_headers import TensorEntry

_BLOCK = 1 << 20


def new_digest() -> Any:
    """Returns an empty digest, with `update(bytes)` and `hexdigest()`."""
    return xxhash.xxh3_128()


def tensor_checksums(directory: Path) -> dict[str, str]:
    """Returns the digest of every tensor of a checkpoint, by name; reads all of it once.

    Raises:
        ModelError: The checkpoint is incomplete.
    """
    entries = read_tensors(directory)
    return {name: file_checksum(entry.file, entry.start, entry.end) for name, entry in entries.items()}


def file_checksum(path: Path, start: int = 0, end: int | None = None) -> str:
    """Returns the digest of a file, or of its bytes [start, end)."""
    digest, left = new_digest(), (path.stat().st_size if end is None else end) - start
    with path.open("rb") as file:
        file.seek(start)
        while left and (data := file.read(min(_BLOCK, left))):
            digest.update(data)
            left -= len(data)
    return str(digest.hexdigest())


def check_digest(name: str, entry: TensorEntry, found: str, expected: Mapping[str, str]) -> None:
    """Compares the digest of a tensor that was read to its end; unknown tensors pass.

    Raises:
        ModelError: It is not the tensor that was recorded.
    """
    if expected.get(name, found) != found:
        raise ModelError(
            f"`{name}` in `{entry.file}` is damaged: its checksum is not the one that was recorded for it",
            hint="a disk or a copy changed it; download the model again, or merge again",
        )
