"""A checkpoint as people publish it: weights, tokenizer, template, generation config and a model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from mamba_sft.disk import disk_errors_explained, require_space
from mamba_sft.errors import ExportError
from mamba_sft.exporting.full_model import FullModel, find_model
from mamba_sft.exporting.hub.push import MARK
from mamba_sft.exporting.logits import logits_of
from mamba_sft.exporting.texts import prompt_of
from mamba_sft.merging.preparing import PreparedMerge
from mamba_sft.merging.summed import MergedTensors, write_companions
from mamba_sft.model.portable import settle_checkpoint
from mamba_sft.model.tensor_files import one_thread, write_shard
from mamba_sft.run import (
    MERGE_REPORT,
    MODEL_CARD,
    MODEL_FACTS,
    atomic_directory,
    check_output,
)
from mamba_sft.run_contents import check_replaceable, refuse_strangers
from mamba_sft.wording import size_text


def write_checkpoint(
    model: FullModel,
    output: Path,
    add_card: Callable[[Path], None],
    progress: Callable[[int, int], None],
) -> None:
    """Writes the model as `transformers` loads it; the directory gets its name when it is complete.

    A merged checkpoint is linked where the disk allows, so it takes no second 13.5 GiB; base and adapter are
    summed into the base's own shards.

    Args:
        model: The model.
        output: The directory; an earlier export there is replaced at the end.
        add_card: Writes the model card and what belongs to it into the directory it is given.
        progress: Called with the bytes done and their total.

    Raises:
        UsageError: `output` is someone else's.
        ExportError: The disk is too full, or what was written is not the model.
    """
    _check_output(output, model)
    need = f"the model takes {size_text(_nbytes(model))}"
    with disk_errors_explained(output, need, ExportError), atomic_directory(output) as directory:
        if model.directory is not None:
            _copy(model.directory, directory, progress)
        elif model.merge is not None:
            require_space(output, model.merge.sizes, "the model takes", ExportError)
            _sum(model.merge, directory, progress)
            _check(model, directory)
        else:
            raise ExportError(f"`{model.name}` is a base without its adapter, and no checkpoint of its own")
        add_card(directory)


def _copy(source: Path, directory: Path, progress: Callable[[int, int], None]) -> None:
    paths = sorted(path for path in source.iterdir() if path.is_file())
    paths = [path for path in paths if path.name not in (MERGE_REPORT, MODEL_FACTS, MODEL_CARD)]
    total = sum(path.stat().st_size for path in paths)
    done = 0
    for path in paths:
        if path.suffix == ".safetensors":
            _link(path.resolve(), directory / path.name)
        else:
            shutil.copyfile(path, directory / path.name)
        done += path.stat().st_size
        progress(done, total)
    settle_checkpoint(directory)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that has no links
        require_space(target.parent, [source.stat().st_size], "the model takes", ExportError)
        shutil.copyfile(source, target)


def _sum(merge: PreparedMerge, directory: Path, progress: Callable[[int, int], None]) -> None:
    tensors = MergedTensors(merge, merge.source, lambda done: progress(done, merge.nbytes))
    with one_thread():
        for file, layouts in merge.shards.items():
            write_shard(directory / file, layouts, tensors.blocks)
    write_companions(merge, directory)


def _check(model: FullModel, directory: Path) -> None:
    """The files read back must give the very logits of base and adapter: both are rounded alike."""
    _, prompt = prompt_of(model)
    (expected,), (found,) = logits_of(model, [prompt]), logits_of(find_model(directory), [prompt])
    if not torch.equal(expected, found):
        raise ExportError(
            f"the files written to `{directory}` are not base + adapter",
            hint="the disk or memory may be faulty, or a file changed meanwhile; export again",
        )


def _check_output(output: Path, model: FullModel) -> None:
    check_output(output, model.sources, "exported")
    card = output / MODEL_CARD
    ours = card.is_file() and f"\n- {MARK}\n".encode() in card.read_bytes()  # anybody's file, of any kind
    check_replaceable(output, ours, "an earlier export", f"its `{MODEL_CARD}` is not from here")
    beside = [place for place in model.sources if place is not None]
    refuse_strangers(output, [path.name for place in beside for path in place.iterdir()])


def _nbytes(model: FullModel) -> int:
    if model.merge is not None:
        return model.merge.nbytes
    return sum(entry.end - entry.start for entry in model.tensors.entries.values())
