"""The loss on rows that were not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mamba_sft.errors import DataError
from mamba_sft.inference.evaluating import evaluation_mode

# Positions projected at a time: 65,024 float32 logits each make 0.25 GB, however long the rows.
_POSITIONS = 1024


def heldout_loss(
    model: Any, dataset: Sequence[Any], collator: Callable[[list[Any]], Any], batch_size: int
) -> float:
    """Returns the mean negative log-likelihood of the trained tokens, each token weighing the same.

    The full logits never exist: positions without a label are skipped, the rest are projected in pieces.

    Args:
        model: A FalconMamba model, plain, quantized or with an adapter; its training mode is restored.
        dataset: Rows with `input_ids` and `labels`, by integer index.
        collator: Rows -> `input_ids`, `labels` (-100: not trained), `seq_idx`, all (B, L).
        batch_size: Rows at a time.

    Raises:
        DataError: No token is trained in any row.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = base.get_input_embeddings().weight.device
    total, count = 0.0, 0
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(dataset), batch_size):
            rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = collator(rows)
            labels = batch["labels"][:, 1:]
            trained = labels != -100
            labels = labels[trained].to(device)
            inputs = {
                name: x.to(device)
                for name, x in batch.items()
                if isinstance(x, torch.Tensor) and name != "labels"
            }
            hidden = base.backbone(**inputs, use_cache=False).last_hidden_state[:, :-1]
            total += _losses(base.get_output_embeddings(), hidden[trained.to(device)], labels)
            count += len(labels)
    if count == 0:
        raise DataError(
            f"none of the {len(dataset)} held-out rows has a token to be scored on",
            hint="a larger `data.validation`, or a longer `data.max_length`, leaves answers in them",
        )
    return total / count


def _losses(head: Any, hidden: torch.Tensor, labels: torch.Tensor) -> float:
    dtype = getattr(head, "original_module", head).weight.dtype
    total = 0.0
    for piece, targets in zip(hidden.split(_POSITIONS), labels.split(_POSITIONS), strict=True):
        logits = head(piece.to(dtype)).float()
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    return total
