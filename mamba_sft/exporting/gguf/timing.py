"""How long GGUF files will take on this machine, from a sample of the work done here and now."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import islice

import torch
from gguf import GGMLQuantizationType

from mamba_sft.exporting.gguf.files import PreparedFiles
from mamba_sft.exporting.gguf.types import block_size
from mamba_sft.exporting.gguf.verifying import HELDOUT_TOKENS
from mamba_sft.llama_cpp import library as llama_cpp
from mamba_sft.model.tensor_files import one_thread

_SAMPLED_BLOCKS = 8
# Measured on two cores with 7.27B parameters, where what follows from them was within a quarter of the truth:
_PLAIN = 1e-9  # seconds to turn a value into 16 or 32 bits
_BYTE = 1.5e-9  # seconds to write a byte, whatever the number of cores
_WALK = 5e-9  # seconds to make a stored weight a float32 one, each time the model walks over its layers
_START = 0.3  # seconds to start llama.cpp
_LLAMA_CPP = 2.0  # how much longer llama.cpp takes for a product than torch does in float32


def writing_seconds(prepared: PreparedFiles) -> float:
    """Returns about how long reading, summing, quantizing and writing will take, on all cores.

    A few blocks of the largest tensor are read for it.
    """
    tensors = prepared.tensors
    largest = max(tensors, key=lambda tensor: tensor.values)
    count = 0
    with one_thread():
        started = time.perf_counter()
        for _, rows in islice(prepared.model.tensors.blocks(largest.source), _SAMPLED_BLOCKS):
            values = largest.transform(rows)
            torch.isfinite(values).all()  # as every block is looked through when it is written
            count += values.numel()
        seconds = (time.perf_counter() - started) / count * sum(tensor.values for tensor in tensors)
    work: dict[GGMLQuantizationType, int] = {}
    for tensor in tensors:
        for kind in {file.types[tensor.name] for file in prepared.layouts}:
            work[kind] = work.get(kind, 0) + tensor.values
    seconds += sum(_encoding_seconds(kind) * values for kind, values in work.items())
    return seconds / (os.cpu_count() or 1) + _BYTE * prepared.nbytes


def checking_seconds(prepared: PreparedFiles) -> float:
    """Returns about how long holding the files against the model will take.

    The model reads the held-out text once, llama.cpp once for each set of tensors, and the model once more
    over the answers.
    """
    weights = sum(tensor.values for tensor in prepared.tensors)
    left, right = torch.randn(HELDOUT_TOKENS, 2048), torch.randn(2048, 2048)
    left @ right  # threads start
    product = _timed(lambda: left @ right) / right.numel() * weights
    files = len({file.payload for file in prepared.layouts})
    return float(product * (1 + _LLAMA_CPP * files) + _START * files + 2 * _WALK * weights)


def _encoding_seconds(kind: GGMLQuantizationType) -> float:
    """Seconds to store one value."""
    if block_size(kind) == 1:
        return _PLAIN
    sample = torch.randn(32, 4096, generator=torch.Generator().manual_seed(0)).numpy()
    llama_cpp.quantize(kind, sample[:1])  # the first call makes tables
    return float(_timed(lambda: llama_cpp.quantize(kind, sample)) / sample.size)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
