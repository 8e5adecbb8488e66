"""The full model that is exported: a merged checkpoint, or base and adapter summed on the way."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mamba_sft.errors import ExportError, ModelError
from mamba_sft.merging.preparing import PreparedMerge, match_adapter
from mamba_sft.merging.saved_adapter import EMBEDDINGS, HEAD
from mamba_sft.merging.summed import MergedTensors
from mamba_sft.model.checkpoint import is_hub_id, read_config, read_tensors
from mamba_sft.model.tensor_files import DTYPES, StoredTensors
from mamba_sft.recipe.builtin import find_path
from mamba_sft.run import ADAPTER_WEIGHTS, MERGE_REPORT, MODEL_FACTS, Run
from mamba_sft.run_reading import read_object

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FullModel:
    """A model to export.

    Args:
        name: What its files are called.
        config: Its `config.json`.
        tensors: Its weights.
        tokenizer_dir: Where its tokenizer, chat template and generation config are.
        base: The base model it was tuned from, as the recipe names it, or None if that is not known.
        run: The run it came from, or None for a plain checkpoint.
        directory: The checkpoint on disk, or None where base and adapter are summed on the way.
        merge: How they are summed, or None.
        one_head: Whether a head that equals the embedding bit by bit counts as the same matrix.
    """

    name: str
    config: dict[str, Any]
    tensors: StoredTensors
    tokenizer_dir: Path
    base: str | None = None
    run: Run | None = None
    directory: Path | None = None
    merge: PreparedMerge | None = None
    one_head: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, in the order of the files."""
        if isinstance(self.tensors, SummedTensors):
            return self.tensors.shapes
        entries = sorted(self.tensors.entries.items(), key=lambda item: (item[1].file, item[1].start))
        return {name: entry.shape for name, entry in entries}

    @property
    def base_id(self) -> str | None:
        """The base's hub id, or None if it is not known or was a directory."""
        if self.base is None or "/" not in self.base or find_path(self.base).is_dir():
            return None
        return self.base if is_hub_id(self.base) else None

    @cached_property
    def tied(self) -> bool:
        """Whether one matrix is both embedding and head: by name, by config, or bit by bit."""
        if HEAD not in self.shapes or self.config.get("tie_word_embeddings", True):
            return True
        if not self.one_head or self.shapes[HEAD] != self.shapes[EMBEDDINGS]:
            return False
        pairs = zip(self.tensors.blocks(EMBEDDINGS), self.tensors.blocks(HEAD), strict=True)
        return all(torch.equal(left, right) for (_, left), (_, right) in pairs)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, with its chat template.

        Raises:
            ModelError: It cannot be read.
        """
        from transformers import AutoTokenizer

        if not (self.tokenizer_dir / "tokenizer.json").is_file():
            raise ModelError(
                f"`{self.tokenizer_dir}` has no `tokenizer.json`",
                hint="copy the tokenizer beside the weights",
            )
        try:
            return AutoTokenizer.from_pretrained(
                self.tokenizer_dir, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # tokenizers raises a bare Exception for a broken file
            raise ModelError(f"the tokenizer in `{self.tokenizer_dir}` cannot be read: {error}") from error

    @property
    def sources(self) -> list[Path | None]:
        """The directories it is read from, where nothing may be exported to."""
        return [self.directory, self.tokenizer_dir, self.merge.base if self.merge else None]

    @property
    def generation_config(self) -> dict[str, Any]:
        """`generation_config.json`, empty if there is none."""
        return read_object(self.tokenizer_dir / "generation_config.json")


class SummedTensors(StoredTensors):
    """The tensors that merging the adapter would write, one block of rows at a time.

    Args:
        merge: A merge that can be done.
    """

    def __init__(self, merge: PreparedMerge):
        super().__init__(merge.entries)
        self.layouts = {layout.name: layout for layout in merge.layouts}
        self._merged = MergedTensors(merge, merge.source)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape; a grown vocabulary has more rows than the base's file."""
        return {name: layout.shape for name, layout in self.layouts.items()}

    def blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields a merged tensor from its first row to its last, as (row number, rows), rounded once."""
        start = 0
        for rows in self._merged.blocks(self.layouts[name]):
            yield start, rows
            start += len(rows) if rows.ndim else 1

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Returns a merged tensor's shape."""
        return self.layouts[name].shape


def find_model(where: Run | str | Path) -> FullModel:
    """Returns the model of a run or of a checkpoint's directory.

    Of a run that trained all weights that is its `model/`. Of others, `merged/` is taken where it is no older
    than the adapter; else base and adapter are summed.

    Args:
        where: A run, its directory, or the directory of a FalconMamba checkpoint.

    Raises:
        MambaSFTError: There is none, or it is incomplete.
    """
    if isinstance(where, Run) or not (Path(where) / "config.json").is_file():
        return _of_run(Run.open(where))
    directory = Path(where)
    return _of_checkpoint(directory, directory.resolve().name)


def _of_run(run: Run) -> FullModel:
    name = run.path.resolve().name
    if run.model.is_dir():
        return _of_checkpoint(run.model, name, run)
    if (run.merged / MERGE_REPORT).is_file():
        stale = _age(run.merged / MERGE_REPORT) < _age(run.adapter / ADAPTER_WEIGHTS)
        if not stale:
            return _of_checkpoint(run.merged, name, run)
        logger.warning("`%s` is older than the adapter: base and adapter are taken instead", run.merged)
    merge = match_adapter(run, run.export, None)
    return FullModel(
        name, merge.config, SummedTensors(merge), run.adapter, merge.facts.base, run, merge=merge
    )


def _age(path: Path) -> float:
    return path.stat().st_mtime if path.is_file() else 0.0


def _of_checkpoint(directory: Path, name: str, run: Run | None = None) -> FullModel:
    config, entries = read_config(directory), read_tensors(directory)
    for tensor, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise ModelError(f"`{tensor}` is stored as {entry.dtype}; exporting handles {', '.join(DTYPES)}")
    report = _record(directory)
    tensors = StoredTensors(entries, report.get("checksums"))
    return FullModel(name, config, tensors, directory, report.get("base"), run, directory=directory)


def _record(directory: Path) -> dict[str, Any]:
    """What a merge, or training, recorded of the checkpoint it wrote; empty for any other."""
    verb, path = "a merge", directory / MERGE_REPORT
    if not path.exists():
        verb, path = "training", directory / MODEL_FACTS
    report = read_object(path)
    checksums, base = report.get("checksums"), report.get("base")
    if isinstance(checksums, dict | None) and isinstance(base, str | None):
        return report
    hint = "merge the run again" if verb == "a merge" else "copy the model again"
    raise ExportError(f"`{path}` is not what {verb} writes", hint=hint)


def base_of(run: Run, merge: PreparedMerge) -> FullModel:
    """Returns a run's base by itself, with the tokenizer and template that its adapter was trained with."""
    tensors = merge.source
    name = f"{run.path.resolve().name}.base"
    base = merge.facts.base
    return FullModel(name, merge.config, tensors, run.adapter, base, run, one_head=not merge.adapter.rows)
