"""GGUF files written from a model's tensors, a block of rows at a time, several files in one pass.

Every block is read (and summed) once and quantized once for each type that any of the files wants, on all
cores, so that files of the same tensors cost no more than one. Nothing larger than a few blocks is ever in
memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from mamba_sft.errors import ModelError
from mamba_sft.exporting.full_model import FullModel
from mamba_sft.exporting.gguf.metadata import Vocabulary, add_metadata
from mamba_sft.exporting.gguf.tensors import ExportTensor
from mamba_sft.exporting.gguf.types import BF16, F16, F32, Method, padded, stored_bytes
from mamba_sft.llama_cpp import library as llama_cpp
from mamba_sft.model.tensor_files import as_bytes, one_thread

Importance = Mapping[str, llama_cpp.Floats]
"""How much each column of a tensor matters, by GGUF name."""
_AHEAD = 4  # blocks read ahead for each worker


@dataclass(frozen=True)
class FileLayout:
    """One GGUF file to be written.

    Args:
        method: How its tensors are stored.
        types: The type of every tensor, by GGUF name.
        offsets: Where every tensor starts, counted from the end of the header.
        nbytes: Bytes of all tensors.
    """

    method: Method
    types: dict[str, GGMLQuantizationType]
    offsets: dict[str, int]
    nbytes: int

    @property
    def payload(self) -> tuple[int, ...]:
        """What tells its tensors from another method's: equal for files that differ in their header alone."""
        return tuple(int(kind) for kind in self.types.values())


def lay_out_file(method: Method, tensors: Sequence[ExportTensor]) -> FileLayout:
    """Settles types and places from shapes alone."""
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    types, offsets, end = {}, {}, 0
    for tensor in tensors:
        types[tensor.name] = method.tensor_type(tensor.name, tensor.shape, tied=tied)
        offsets[tensor.name] = end
        end += padded(stored_bytes(types[tensor.name], tensor.shape))
    return FileLayout(method, types, offsets, end)


def write_header(
    path: Path, layout: FileLayout, model: FullModel, vocabulary: Vocabulary, tensors: Sequence[ExportTensor]
) -> int:
    """Writes everything of a file but its tensors' values, and returns where those start."""
    writer = GGUFWriter(path, "mamba")
    add_metadata(writer, model, vocabulary, list(tensors), layout.method)
    for tensor in tensors:
        kind = layout.types[tensor.name]
        nbytes = stored_bytes(kind, tensor.shape)
        values = np.dtype(np.float32)  # the shape counts values; of bytes the writer would take it for bytes
        writer.add_tensor_info(tensor.name, tensor.shape, values, nbytes, raw_dtype=kind)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    return padded(path.stat().st_size)


@dataclass
class _OpenFile:
    descriptor: int
    layout: FileLayout
    data_start: int


class GGUFFiles:
    """Writes the tensors of a model into several files at once.

    Args:
        model: The model.
        tensors: Its tensors, in order.
        importance: From an importance matrix; empty for none.
        progress: Called with the number of values done.
    """

    def __init__(
        self,
        model: FullModel,
        tensors: Sequence[ExportTensor],
        importance: Importance,
        progress: Callable[[int], None],
    ):
        self.model, self.tensors, self.importance, self.progress = model, tensors, importance, progress
        self.done = 0
        self.workers = os.cpu_count() or 1

    def write(self, paths: Sequence[Path], layouts: Sequence[FileLayout], vocabulary: Vocabulary) -> None:
        """Writes the files, each under its path, and waits until they are on the disk.

        Raises:
            ModelError: A value is not finite, or the source is cut short.
            OSError: The disk is full, or may not be written to.
        """
        files: list[_OpenFile] = []
        try:
            for path, layout in zip(paths, layouts, strict=True):
                start = write_header(path, layout, self.model, vocabulary, self.tensors)
                files.append(_OpenFile(os.open(path, os.O_RDWR), layout, start))
                os.posix_fallocate(files[-1].descriptor, 0, start + layout.nbytes)  # a full disk shows now
            with (
                one_thread(),
                ThreadPoolExecutor(self.workers, "quantize", torch.set_num_threads, (1,)) as pool,
            ):
                self._write_tensors(files, pool)
            for file in files:
                os.fsync(file.descriptor)
        finally:
            for file in files:
                os.close(file.descriptor)

    def _write_tensors(self, files: Sequence[_OpenFile], pool: ThreadPoolExecutor) -> None:
        running: set[Future[int]] = set()
        try:
            for tensor, start, rows in self._blocks():
                if len(running) >= _AHEAD * self.workers:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    self._count(finished)
                running.add(pool.submit(self._write_block, files, tensor, start, rows))
            self._count(running)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    def _blocks(self) -> Iterator[tuple[ExportTensor, int, torch.Tensor]]:
        for tensor in self.tensors:
            for start, rows in self.model.tensors.blocks(tensor.source):
                yield tensor, start, rows

    def _count(self, finished: set[Future[int]]) -> None:
        for future in finished:
            self.done += future.result()
            self.progress(self.done)

    def _write_block(
        self, files: Sequence[_OpenFile], tensor: ExportTensor, start: int, rows: torch.Tensor
    ) -> int:
        values = tensor.transform(rows)
        if not torch.isfinite(values).all():
            raise ModelError(
                f"`{tensor.source}` has NaN or infinity in rows {start} to {start + len(rows) - 1}",
                hint="the checkpoint is damaged or the training diverged; merge or download it again",
            )
        stored: dict[GGMLQuantizationType, memoryview] = {}
        for file in files:
            kind = file.layout.types[tensor.name]
            if kind not in stored:
                stored[kind] = self._encode(tensor.name, kind, values)
            place = file.data_start + file.layout.offsets[tensor.name]
            place += stored_bytes(kind, (start, *tensor.shape[1:]))
            _write_at(file.descriptor, stored[kind], place)
        return int(values.numel())

    def _encode(self, name: str, kind: GGMLQuantizationType, values: torch.Tensor) -> memoryview:
        if kind == F32:
            return as_bytes(values)
        if kind == BF16:
            return as_bytes(values.to(torch.bfloat16))
        if kind == F16:
            halves = values.to(torch.float16)
            if not torch.isfinite(halves).all():
                raise ModelError(f"`{name}` has values beyond float16's range", hint="`-q bf16` keeps them")
            return as_bytes(halves)
        packed = llama_cpp.quantize(kind, values.numpy(), self.importance.get(name))
        return packed.reshape(-1).data


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
