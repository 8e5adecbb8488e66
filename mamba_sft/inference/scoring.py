"""The loss on rows that were not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from mamba_sft.errors import DataError
from mamba_sft.inference.evaluating import evaluation_mode
from mamba_sft.model.full_weights import without_wrapper

# Positions projected at a time: 65,024 float32 logits each make 0.25 GB, however long the rows.
_POSITIONS = 1024


class RowScore(NamedTuple):
    """What a model makes of the trained tokens of a row.

    Args:
        loss: Their negative log-likelihood, summed.
        right: How many of them were the likeliest.
        tokens: How many there are.
    """

    loss: float
    right: int
    tokens: int


def heldout_loss(
    model: Any, dataset: Sequence[Any], collator: Callable[[list[Any]], Any], batch_size: int
) -> float:
    """Returns the mean negative log-likelihood of the trained tokens, each token weighing the same.

    Args:
        model: As for `score_rows`, and so all the others.
        dataset: The rows.
        collator: What makes batches of them.
        batch_size: Rows at a time.

    Raises:
        DataError: No token is trained in any row.
    """
    scores = list(score_rows(model, dataset, collator, batch_size))
    count = sum(one.tokens for one in scores)
    if count == 0:
        raise nothing_scored(len(dataset))
    return sum(one.loss for one in scores) / count


def nothing_scored(rows: int) -> DataError:
    """Returns what to say of rows without a trained token."""
    return DataError(
        f"none of the {rows} held-out rows has a token to be scored on",
        hint="a larger `data.validation`, or a longer `data.max_length`, leaves answers in them",
    )


def score_rows(
    model: Any, dataset: Sequence[Any], collator: Callable[[list[Any]], Any], batch_size: int
) -> Iterator[RowScore]:
    """Yields the score of each row, in order.

    The full logits never exist: positions without a label are skipped, the rest are projected in pieces.

    Args:
        model: A FalconMamba model, plain, quantized or with an adapter; its training mode is restored.
        dataset: Rows with `input_ids` and `labels`, by integer index.
        collator: Rows -> `input_ids`, `labels` (-100: not trained), `seq_idx`, all (B, L).
        batch_size: Rows at a time.
    """
    base = without_wrapper(model)
    device = base.get_input_embeddings().weight.device
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = collator(rows)
        labels = batch["labels"][:, 1:]
        trained = labels != -100
        inputs = {
            name: x.to(device)
            for name, x in batch.items()
            if isinstance(x, torch.Tensor) and name != "labels"
        }
        with torch.no_grad(), evaluation_mode(model):
            hidden = base.backbone(**inputs, use_cache=False).last_hidden_state[:, :-1]
            found = _scores(
                base.get_output_embeddings(), hidden[trained.to(device)], labels[trained].to(device)
            )
        losses, right = (part.split(trained.sum(1).tolist()) for part in found)
        for loss, hits in zip(losses, right, strict=True):
            yield RowScore(float(loss.sum()), int(hits.sum()), len(loss))


def _scores(head: Any, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each position in float64, and whether its label was the likeliest; on the host."""
    dtype = getattr(head, "original_module", head).weight.dtype
    losses, right = [], []
    for piece, targets in zip(hidden.split(_POSITIONS), labels.split(_POSITIONS), strict=True):
        logits = head(piece.to(dtype)).float()
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").double())
        right.append(logits.argmax(-1) == targets)
    return torch.cat(losses).cpu(), torch.cat(right).cpu()
