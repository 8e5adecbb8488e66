"""A run's adapter as a GGUF LoRA, which llama.cpp and Ollama put on a base at load time.

llama.cpp computes W x + (alpha / rank) B A x, with one alpha a file and the rank of each tensor's own B. What
PEFT scales otherwise (rsLoRA, patterns) is folded into B. The trained rows of the chat's special tokens fit
as well: k new rows are a difference of rank k, the changes in one factor and a one in each row of the other.

A base file made with the epsilon fix has its `ssm_x` scaled, so the B of an adapter on it is scaled alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter

from mamba_sft.errors import ExportError
from mamba_sft.exporting.gguf.tensors import epsilon_scale, gguf_name
from mamba_sft.exporting.gguf.types import padded
from mamba_sft.merging.preparing import PreparedMerge
from mamba_sft.merging.saved_adapter import EMBEDDINGS, HEAD, SavedAdapter
from mamba_sft.model.tensor_files import read_rows

Floats = np.ndarray[Any, np.dtype[np.float32]]
_MERGE_HINT = "export the whole model instead: leave `--adapter-only` out"


@dataclass(frozen=True)
class Pair:
    """The two factors of one tensor's update.

    Args:
        name: The tensor's GGUF name.
        a: (r, columns); for the embedding, which is looked up and not multiplied with, (rows, r).
        b: (rows, r); for the embedding (columns, r).
    """

    name: str
    a: Floats
    b: Floats


def write_adapter(path: Path, merge: PreparedMerge, *, name: str, fix_epsilon: bool) -> int:
    """Writes the adapter of a run, a tensor at a time, and reads it back.

    Args:
        path: The file.
        merge: The run's adapter and base, which fit.
        name: What the file says it is called.
        fix_epsilon: Whether it is for base files made with the epsilon fix.

    Returns:
        The file's size in bytes.

    Raises:
        ExportError: GGUF cannot hold this adapter, or what was written is not what was meant.
    """
    check_expressible(merge)
    alpha = adapter_alpha(merge.adapter)
    scale = epsilon_scale(merge.config) if fix_epsilon else 1.0
    sources = list(_sources(merge, alpha, scale))
    writer = GGUFWriter(path, "mamba")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_name(name)
    writer.add_float32("adapter.lora.alpha", alpha)
    total = 0
    for tensor, shapes, _ in sources:
        for suffix, shape in zip(("lora_a", "lora_b"), shapes, strict=True):
            nbytes = 4 * shape[0] * shape[1]
            writer.add_tensor_info(f"{tensor}.{suffix}", shape, np.dtype(np.float32), nbytes)
            total += padded(nbytes)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # a full disk shows now; numpy, which writes below, does not say why it fails
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, padded(path.stat().st_size) + total)
        for _, _, load in sources:
            pair = load()
            writer.write_tensor_data(np.ascontiguousarray(pair.a))
            writer.write_tensor_data(np.ascontiguousarray(pair.b))
    _read_back(path, sources)
    return path.stat().st_size


def check_expressible(merge: PreparedMerge) -> None:
    """Refuses an adapter that is more than low-rank sums.

    Raises:
        ExportError: It has DoRA's lengths, biases or new rows, or shares rows that llama.cpp cannot share.
    """
    adapter = merge.adapter
    reason = None
    if adapter.config.get("use_dora"):
        reason = "DoRA scales the base's own rows"
    elif any("lora_B.bias" in parts for parts in adapter.modules.values()) or adapter.whole:
        reason = "it has trained biases"
    elif merge.facts.resize_to is not None:
        reason = "its vocabulary has more rows than the base's"
    elif adapter.rows and (HEAD not in merge.entries or merge.config.get("tie_word_embeddings", True)):
        reason = "its trained rows are of a matrix that is both embedding and head"
    if reason:
        raise ExportError(
            f"the adapter in `{adapter.path}` cannot be a GGUF LoRA: {reason}", hint=_MERGE_HINT
        )


def adapter_alpha(adapter: SavedAdapter) -> float:
    """Returns the file's alpha: with the config's own rank, alpha / rank is PEFT's scale."""
    rank, alpha = int(adapter.config["r"]), float(adapter.config["lora_alpha"])
    return alpha * rank**0.5 if adapter.config.get("use_rslora") else alpha


_PairShapes = tuple[tuple[int, int], tuple[int, int]]


def _sources(
    merge: PreparedMerge, alpha: float, epsilon: float
) -> Iterator[tuple[str, _PairShapes, Callable[[], Pair]]]:
    """Yields every tensor's GGUF name, the shapes of its factors, and what reads them."""
    adapter = merge.adapter
    for module in adapter.modules:
        name = _gguf_name(f"{module}.weight")
        factors = adapter.low_rank(module)
        shapes = (tuple(factors.a.shape), tuple(factors.b.shape))
        scale = epsilon if name.endswith("ssm_x.weight") else 1.0
        yield (
            name,
            shapes,
            lambda module=module, name=name, scale=scale: _module(  # type: ignore[misc]
                adapter, module, name, alpha, scale
            ),
        )
    for source, (ids, values) in adapter.rows.items():
        name = _gguf_name(source)
        wide, tall = (len(ids), values.shape[1]), (merge.entries[source].shape[0], len(ids))
        shapes = (tall, wide[::-1]) if source == EMBEDDINGS else (wide, tall)
        yield name, shapes, lambda source=source, name=name: _rows(merge, source, name, alpha)  # type: ignore[misc]


def _gguf_name(source: str) -> str:
    name = gguf_name(source)
    if name is None:
        raise ExportError(f"llama.cpp has no tensor for the adapter's `{source}`", hint=_MERGE_HINT)
    return name


def _module(adapter: SavedAdapter, module: str, name: str, alpha: float, epsilon: float) -> Pair:
    factors = adapter.low_rank(module)
    rank = factors.a.shape[0]
    return Pair(name, factors.a.numpy(), (factors.b * (epsilon * factors.scale * rank / alpha)).numpy())


def _rows(merge: PreparedMerge, source: str, name: str, alpha: float) -> Pair:
    ids, values = merge.adapter.rows[source]
    entry = merge.entries[source]
    base = torch.cat([read_rows(entry, row, row + 1) for row in ids.tolist()]).float()
    change = values - base
    ones = torch.zeros(entry.shape[0], len(ids))
    ones[ids, torch.arange(len(ids))] = 1.0
    scale = len(ids) / alpha
    if source == EMBEDDINGS:
        return Pair(name, ones.numpy(), (change.T * scale).numpy())
    return Pair(name, change.numpy(), (ones * scale).numpy())


def _read_back(path: Path, sources: list[tuple[str, _PairShapes, Callable[[], Pair]]]) -> None:
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, _, load in sources:
        pair = load()
        for suffix, wanted in (("lora_a", pair.a), ("lora_b", pair.b)):
            if not np.array_equal(found[f"{name}.{suffix}"].data, wanted) or not np.isfinite(wanted).all():
                raise ExportError(
                    f"`{name}.{suffix}` was not written as it is, or is not finite",
                    hint="the disk or memory may be faulty; export again",
                )
