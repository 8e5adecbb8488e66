"""Tensors of a checkpoint read and written a few rows at a time.

The safetensors library maps whole shards into memory, or serializes them from memory; with 5 GB shards
neither fits a small machine. The format is simple enough to stream: eight bytes of header length, a JSON
header that gives every tensor's dtype, shape and place, then the data.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import cast

import torch

from mamba_sft.errors import ModelError
from mamba_sft.model.checksums import check_digest, new_digest
from mamba_sft.model.tensor_headers import TensorEntry

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PENDING_BLOCKS = 16
_BLOCK_ELEMENTS = 1 << 18  # 1 MiB in float32: still in the cache when it is summed, rounded and written


@dataclass(frozen=True)
class Layout:
    """One tensor of a shard to be written.

    Args:
        name: Its name in the checkpoint.
        dtype: As safetensors names it, e.g. `BF16`.
        shape: Its dimensions.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return prod(self.shape) * int(DTYPES[self.dtype].itemsize)


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) over the first dimension: a megabyte or so, a multiple of 64 rows."""
    rows = shape[0] if shape else 1
    step = max(64, _BLOCK_ELEMENTS // max(1, prod(shape[1:])) // 64 * 64)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def read_rows(entry: TensorEntry, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Reads rows [start, stop) of a tensor into fresh memory.

    A plain read, not a map: mapped pages count as the process's own for as long as the kernel keeps them.

    Args:
        entry: Where the tensor lies.
        start: First row.
        stop: Row after the last; None reads to the end.

    Returns:
        The rows, (stop - start, ...), in the file's dtype, one of `DTYPES`.

    Raises:
        ModelError: The file ended early.
    """
    rows = entry.shape[0] if entry.shape else 1
    stop = rows if stop is None else stop
    row_bytes = (entry.end - entry.start) // max(1, rows)
    buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start + start * row_bytes)
        view = memoryview(buffer.numpy())
        while view:
            count = cast(RawIOBase, file).readinto(view)
            if not count:
                raise ModelError(
                    f"`{entry.file}` ended early", hint="the file is cut short; download it again"
                )
            view = view[count:]
    shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
    return buffer.view(DTYPES[entry.dtype]).view(shape)


class StoredTensors:
    """The tensors of a checkpoint, as they are stored.

    Args:
        entries: Where each lies, by name, as `read_tensors` gives them.
        checksums: What was recorded of them, by name; those without pass unchecked.
    """

    def __init__(self, entries: Mapping[str, TensorEntry], checksums: Mapping[str, str] | None = None):
        self.entries = entries
        self.checksums = checksums or {}

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields a tensor from its first row to its last, as (row number, rows); see `read_rows`.

        Raises:
            ModelError: At the end, that what was read is not what was recorded.
        """
        entry, digest = self.entries[name], new_digest()
        for start, stop in row_blocks(entry.shape):
            rows = read_rows(entry, start, stop)
            if name in self.checksums:
                digest.update(as_bytes(rows))
            yield start, rows
        if name in self.checksums:
            check_digest(name, entry, digest.hexdigest(), self.checksums)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self.entries[name].shape

    def whole(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """Returns a whole tensor in float32, in the memory of `out` if there is one, of its shape."""
        tensor = torch.empty(self.shape_of(name), dtype=torch.float32) if out is None else out
        for start, rows in self.blocks(name):
            (tensor[start : start + len(rows)] if tensor.ndim else tensor).copy_(rows)
        return tensor

    def layer(self, prefix: str, memory: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors of one layer, whole, in float32, by what follows `prefix` in their names.

        Args:
            prefix: What their names begin with.
            memory: Where a walk over the layers keeps them, each in the place of the one before: fresh pages
                cost as much as reading does. Empty at first.
        """
        for name in self.entries:
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                memory[rest] = self.whole(name, memory.get(rest))
        return dict(memory)


def write_shard(
    path: Path, tensors: Sequence[Layout], blocks: Callable[[Layout], Iterator[torch.Tensor]]
) -> None:
    """Writes one safetensors file, a block of rows at a time.

    Args:
        path: The file; replaced if it exists.
        tensors: What it holds, in order.
        blocks: Yields a tensor's rows in order, already in its dtype.

    Raises:
        ModelError: A tensor's blocks are not as large as its shape says; the file is not complete then.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        place = [end, end + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    # The disk is waited for in a thread of its own, while the next blocks are computed.
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as writer:
        _write_all(file, len(text).to_bytes(8, "little") + text)
        pending: deque[Future[int]] = deque()
        for tensor in tensors:
            count = 0
            for block in blocks(tensor):
                count += block.nbytes
                pending.append(writer.submit(_write_all, file, as_bytes(block)))
                while len(pending) >= _PENDING_BLOCKS:
                    pending.popleft().result()
            if count != tensor.nbytes:  # every later tensor would be read from the wrong place
                raise ModelError(f"`{tensor.name}` came to {count:,} bytes instead of {tensor.nbytes:,}")
            pending.append(writer.submit(_start_flush, file, count))
        for written in pending:
            written.result()
        os.fsync(file.fileno())  # a disk that fills up late must fail here, before the rename


def as_bytes(block: torch.Tensor) -> memoryview:
    """Returns the bytes of a tensor on the CPU, as they are stored."""
    return memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy())


def _start_flush(file: RawIOBase, count: int) -> int:
    """Lets the disk begin with the last `count` bytes, which the kernel would keep until the final fsync."""
    if hasattr(os, "posix_fadvise"):  # pages that are not needed are written at once, and nothing waits
        os.posix_fadvise(file.fileno(), file.tell() - count, count, os.POSIX_FADV_DONTNEED)
    return 0


def _write_all(file: RawIOBase, data: bytes | memoryview) -> int:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    return len(data)


_pool_lock = threading.Lock()
_pool = {"users": 0, "threads": 0}
"""Who computes on one core now, and how many threads torch had before."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one core: work in cache-sized pieces is done before threads would have met.

    The number is torch's own, for all threads of the process. Blocks may overlap: the last one to end puts
    back what was there before the first.
    """
    with _pool_lock:
        if _pool["users"] == 0:
            _pool["threads"] = torch.get_num_threads()
            torch.set_num_threads(1)
        _pool["users"] += 1
    try:
        yield
    finally:
        with _pool_lock:
            _pool["users"] -= 1
            if _pool["users"] == 0:
                torch.set_num_threads(_pool["threads"])
