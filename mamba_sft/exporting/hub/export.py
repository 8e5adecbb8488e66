"""The export that is a checkpoint, for the hub or a directory."""

from __future__ import annotations

from mamba_sft.exporting.full_model import find_model
from mamba_sft.exporting.hub.card import write_card
from mamba_sft.exporting.hub.checkpoint import write_checkpoint
from mamba_sft.exporting.hub.push import check_push, push
from mamba_sft.exporting.task import Exported, Task, output_of
from mamba_sft.run import HUB_CHECKPOINT


def export_checkpoint(task: Task) -> Exported:
    """Writes the model as `transformers` loads it, with its model card; pushes it if that is asked for."""
    repo = task.hub.push_to_hub
    if repo is not None:
        check_push(repo)
    model = find_model(task.run)
    output = output_of(model, task.output)
    directory = output if task.output is not None else output / HUB_CHECKPOINT
    name = task.name or model.name
    write_checkpoint(
        model,
        directory,
        lambda path: write_card(model, path, name, task.hub),
        lambda done, total: task.progress("writing", done, total),
    )
    url = push(directory, repo, private=task.hub.private) if repo is not None else None
    return Exported(directory, others=[directory], url=url)
