"""The header of a safetensors file, read as something that anybody may have written.

Eight bytes give its length, then comes JSON: for each tensor its dtype, its shape and where its bytes lie,
one tensor behind the other. All of it is checked before a byte of a tensor is read, so that whoever reads
tensors can rely on what it says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mamba_sft.errors import ModelError

_LONGEST = 100_000_000
"""Bytes of a header at most, as the safetensors library has it."""
_MOST_DIMENSIONS = 64
_HUGE = 1 << 63
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16,
    "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""What a number of each dtype takes."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Args:
        file: The shard that holds it.
        dtype: As safetensors names it, e.g. `BF16`.
        shape: Its dimensions.
        start: First byte in the file.
        end: One past the last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Returns the tensors of a safetensors file by name.

    Raises:
        ModelError: It cannot be read, is cut short, or says what cannot be.
    """
    text, start, size = _header_text(path)
    try:
        tensors = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, size) from error
    if not isinstance(tensors, dict):
        raise _unreadable(path, size)
    tensors.pop("__metadata__", None)
    entries = {name: _entry(path, start, name, value) for name, value in tensors.items()}
    expected = max((entry.end for entry in entries.values()), default=start)
    if size < expected:
        raise ModelError(
            f"`{path}` is truncated: it has {size:,} bytes, its header promises {expected:,}",
            hint="an interrupted download leaves this; fetch it again",
        )
    _check_order(path, start, size, entries)
    return entries


def _header_text(path: Path) -> tuple[bytes, int, int]:
    """The header, where the tensors begin, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            whole = len(start) == 8 and length <= min(size - 8, _LONGEST)
            text = file.read(length) if whole else b""
    except OSError as error:
        raise ModelError(f"cannot read `{path}`: {error.strerror or error}") from error
    if start == b"version ":
        raise ModelError(f"`{path}` is a Git LFS pointer, not weights", hint="run `git lfs pull`")
    return text, 8 + length, size


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _unreadable(path: Path, size: int) -> ModelError:
    return ModelError(
        f"`{path}` is not a safetensors file: its header cannot be read ({size:,} bytes in all)",
        hint="it is corrupt or an interrupted download; fetch it again",
    )


def _wrong(path: Path, problem: str) -> ModelError:
    return ModelError(
        f"`{path}` is not a safetensors file that can be trusted: {problem}",
        hint="it is corrupt, or was not written by the safetensors library; fetch it again",
    )


def _entry(path: Path, start: int, name: str, value: Any) -> TensorEntry:
    what = f"tensor `{name:.100}`"
    if not name.isprintable():  # a name is looked up, hashed and shown
        raise _wrong(path, f"{what} has a name that cannot be shown")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _wrong(path, f"{what} is not a dtype, a shape and data offsets but {value!r:.100}")
    dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _wrong(path, f"{what} has the unknown dtype {dtype!r:.100}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise _wrong(path, f"{what} has the shape {shape!r:.100}")
    if not _are_sizes(place) or len(place) != 2 or place[0] > place[1]:
        raise _wrong(path, f"{what} has the data offsets {place!r:.100}")
    begin, end = place
    if prod(shape) * _BITS[dtype] != (end - begin) * 8:
        raise _wrong(path, f"{what}, {dtype} of shape {shape!r:.100}, does not fit its {end - begin:,} bytes")
    return TensorEntry(path, dtype, tuple(shape), start + begin, start + end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(size) is int and 0 <= size < _HUGE for size in values)


def _check_order(path: Path, start: int, size: int, entries: Mapping[str, TensorEntry]) -> None:
    """Each tensor begins where the one before ends, and the last one ends the file."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            how = "overlaps the one before" if entry.start < at else "lies behind bytes of no tensor"
            raise _wrong(path, f"tensor `{name:.100}` {how}")
        at = entry.end
    if at != size:
        raise _wrong(path, f"{size - at:,} bytes behind its last tensor belong to none")
