"""The files of a merged model: its tensors as they are written, and everything around them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch

from mamba_sft.merging.preparing import PreparedMerge
from mamba_sft.model.checkpoint import INDEX_NAME
from mamba_sft.model.checksums import new_digest
from mamba_sft.model.portable import settle_checkpoint
from mamba_sft.model.tensor_files import DTYPES, Layout, StoredTensors, as_bytes
from mamba_sft.run import MERGE_REPORT

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json", ".py",
)  # fmt: skip


class MergedTensors:
    """Produces merged tensors block by block, and counts what it produced.

    Args:
        prepared: What is merged.
        source: The base's tensors.
        progress: Called after every block with the bytes produced so far.
    """

    def __init__(
        self,
        prepared: PreparedMerge,
        source: StoredTensors,
        progress: Callable[[int], None] = lambda done: None,
    ):
        self.prepared, self.source, self.progress = prepared, source, progress
        self.done = self.overflowed = 0
        self.checksums: dict[str, str] = {}

    def blocks(self, layout: Layout) -> Iterator[torch.Tensor]:
        """Yields the merged rows of a tensor, summed in float32 and rounded once to its final dtype."""
        digest = new_digest()
        for rows in self._merged(layout):
            rounded = self._rounded(rows, layout)
            digest.update(as_bytes(rounded))
            yield rounded
            self.done += rounded.nbytes
            self.progress(self.done)
        self.checksums[layout.name] = digest.hexdigest()

    def _merged(self, layout: Layout) -> Iterator[torch.Tensor]:
        name, adapter = layout.name, self.prepared.adapter
        touched = adapter.touches(name)
        for start, rows in self.source.blocks(name):
            yield adapter.merge(name, rows.float(), start) if touched else rows
        size = self.prepared.entries[name].shape
        if layout.shape != size:  # the vocabulary grew
            yield adapter.merge(name, torch.zeros(layout.shape[0] - size[0], *size[1:]), size[0])

    def _rounded(self, rows: torch.Tensor, layout: Layout) -> torch.Tensor:
        rounded = rows.to(DTYPES[layout.dtype])
        if rounded.dtype == torch.float16 and rows.dtype != torch.float16:
            self.overflowed += int((torch.isinf(rounded) & torch.isfinite(rows)).sum())
        return rounded


def write_companions(prepared: PreparedMerge, directory: Path) -> None:
    """Writes what is not weights: index, configs, tokenizer with its template, the base's other files."""
    own = prepared.run.adapter
    ours = {path.name for path in own.iterdir() if path.name in _TOKENIZER_FILES}
    for path in sorted(prepared.base.iterdir()):
        # the base's stop token must not come back with its files
        stale = path.name in _TOKENIZER_FILES and ours
        if _is_companion(path) and not stale:
            shutil.copyfile(path, directory / path.name)
    for name in sorted(ours | {"generation_config.json"}):
        if (own / name).is_file():
            shutil.copyfile(own / name, directory / name)
    (directory / "config.json").write_text(json.dumps(prepared.config, indent=2) + "\n", encoding="utf-8")
    if (prepared.base / INDEX_NAME).is_file():
        index = json.loads((prepared.base / INDEX_NAME).read_text(encoding="utf-8"))
        files = {layout.name: file for file, shard in prepared.shards.items() for layout in shard}
        known = index.get("metadata")
        metadata = (known if isinstance(known, dict) else {}) | {"total_size": prepared.nbytes}
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(prod(layout.shape) for layout in prepared.layouts)
        index = {"metadata": metadata, "weight_map": dict(sorted(files.items()))}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    settle_checkpoint(directory)


def _is_companion(path: Path) -> bool:
    """Small files that belong to the model; not its weights, its page on the hub, or anything hidden."""
    odd = path.name.startswith(".") or path.name.lower() in ("readme.md", "config.json", MERGE_REPORT)
    return path.is_file() and not odd and not path.name.endswith(_NOT_COPIED)
