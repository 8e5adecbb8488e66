"""A loss or a gradient that is no number: which micro-batch it came from, and the end of the run."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object

from mamba_sft.errors import TrainingError
from mamba_sft.model.shards import whole
from mamba_sft.run import write_atomically
from mamba_sft.training.resume_points import find_good
from mamba_sft.training.saving import left_out_if_refused
from mamba_sft.training.spikes import named
from mamba_sft.training.step_loader import Batch


def stop_on_nan(trainer: Any, what: str, bad: list[dict[str, Any]]) -> None:
    """Raises for the first bad micro-batch of any process; all of them come here, and name the same.

    Args:
        trainer: Whose step it is.
        what: What is not a number.
        bad: The bad micro-batches of this process.
    """
    step = trainer.state.global_step + 1
    inputs = gather_object([_as_lists(inputs) for inputs in bad[:1]])[0]
    batch = trainer.run.nan_batch(step)
    if trainer.is_world_process_zero():
        with left_out_if_refused(batch):
            write_atomically(batch, json.dumps(inputs, ensure_ascii=False))
    text = trainer.processing_class.decode(inputs["input_ids"][0][:40])
    kept, _ = find_good(trainer.run)
    where = f"the last good checkpoint is `{kept}`" if kept else "no checkpoint had been saved yet"
    raise TrainingError(
        f"the {what} is not a number at step {step}; {where}\n"
        f"{named([row for rows in inputs['where'] for row in rows])}\n"
        f"the batch is in `{batch}`; its first row starts {text!r}",
        hint="look at that batch, lower `train.learning_rate`, or use bfloat16 instead of float16; "
        "then go on with `--resume`",
    )


def find_bad_gradients(trainer: Any, model: Any, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs the micro-batches of a step again, as they were run; returns those with a bad gradient.

    Dropout draws anew, so it may be none of them this time. Every process runs all of its own, so that
    none waits for another. Sharded gradients are nobody's own: a bad one is in all processes.

    Args:
        trainer: Whose step it was.
        model: As the trainer wrapped it.
        batches: The micro-batches of this process.
    """
    if trainer.has_engine:  # it keeps what it has added up
        return [inputs for inputs in batches if _has_bad_gradient(trainer, inputs)]
    bad = []
    for inputs in batches:
        model.zero_grad()
        with nullcontext() if trainer.is_fsdp_enabled else trainer.accelerator.no_sync(model):
            trainer.take_micro_batch(model, trainer.on_device(inputs))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not torch.isfinite(whole(torch.nn.utils.get_total_norm(gradients))):
            bad.append(inputs)
    return bad


def _has_bad_gradient(trainer: Any, inputs: Batch) -> bool:
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    loss = trainer.compute_loss(trainer.model, trainer.on_device(inputs))
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    norm = torch.nn.utils.get_total_norm([x for x in gradients if x is not None])
    return not bool(torch.isfinite(norm))


def _as_lists(inputs: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch as JSON can hold it: its tensors, and where its rows came from."""
    tokens = {key: value.tolist() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    return tokens | {"where": [list(where) for where in inputs["where"]]}
