"""The export that is a checkpoint, for the hub or a directory, and what is pushed of either kind."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from mamba_sft.exporting.full_model import FullModel, find_model
from mamba_sft.exporting.hub.card import Published, write_card
from mamba_sft.exporting.hub.checkpoint import write_checkpoint
from mamba_sft.exporting.hub.push import check_hub, exported, push_files
from mamba_sft.exporting.request import Exported, ExportRequest, Pushed, output_of
from mamba_sft.run import HUB_CHECKPOINT


def export_checkpoint(request: ExportRequest) -> Exported:
    """Writes the model as `transformers` loads it, with its model card; pushes it if that is asked for."""
    model = find_model(request.run)
    output = output_of(model, request.output)
    directory = output if request.output is not None else output / HUB_CHECKPOINT
    name = request.name or model.name
    there = check_hub(request.hub).gguf_files
    write_checkpoint(
        model,
        directory,
        lambda path: write_card(model, path, name, request.hub, Published(gguf_files=there)),
        lambda done, total: request.progress("writing", done, total),
    )
    pushed = None
    if request.hub.push_to_hub is not None:
        pushed = push_files(
            [path for path in directory.iterdir() if path.is_file()], request.hub, request.progress
        )
    return Exported(directory, others=[directory], pushed=pushed)


def push_gguf(
    model: FullModel, name: str, files: Sequence[Path], others: Sequence[Path], request: ExportRequest
) -> Pushed | None:
    """Pushes GGUF files with a model card that says how to run them, if that is asked for.

    A checkpoint that is in the repository stays described beside them.

    Args:
        model: What they were made of.
        name: What they are called.
        files: The GGUF files.
        others: What belongs to them.
        request: Where to.
    """
    if request.hub.push_to_hub is None:
        return None
    remote = check_hub(request.hub, exported(files[0].parent))
    gguf = sorted({*remote.gguf_files, *(path.name for path in files)})
    with tempfile.TemporaryDirectory() as directory:
        published = Published(checkpoint=remote.has_checkpoint, gguf_files=gguf)
        write_card(model, Path(directory), name, request.hub, published)
        return push_files([*files, *others, *Path(directory).iterdir()], request.hub, request.progress)
