"""The export that is a checkpoint, for the hub or a directory."""

from __future__ import annotations

from mamba_sft.exporting.full_model import find_model
from mamba_sft.exporting.hub.card import write_card
from mamba_sft.exporting.hub.checkpoint import write_checkpoint
from mamba_sft.exporting.hub.push import check_push, push_directory
from mamba_sft.exporting.request import Exported, ExportRequest, output_of
from mamba_sft.run import HUB_CHECKPOINT


def export_checkpoint(request: ExportRequest) -> Exported:
    """Writes the model as `transformers` loads it, with its model card; pushes it if that is asked for."""
    repo = request.hub.push_to_hub
    if repo is not None:
        check_push(repo)
    model = find_model(request.run)
    output = output_of(model, request.output)
    directory = output if request.output is not None else output / HUB_CHECKPOINT
    name = request.name or model.name
    write_checkpoint(
        model,
        directory,
        lambda path: write_card(model, path, name, request.hub),
        lambda done, total: request.progress("writing", done, total),
    )
    url = push_directory(directory, repo, private=request.hub.private) if repo is not None else None
    return Exported(directory, others=[directory], url=url)
