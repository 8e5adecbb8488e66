"""Which rows, or parts of rows, are trained on: the length limit, the validation split and the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mamba_sft.data.rows import RowIndex
from mamba_sft.data.summary import DataSummary
from mamba_sft.data.tokenizing import Tokens
from mamba_sft.errors import DataError

if TYPE_CHECKING:
    from mamba_sft.recipe.fields import DataSection


def cut_row(row: Tokens, data: DataSection, summary: DataSummary) -> list[Tokens]:
    """The row as one piece, cut to `max_length`, or cut into pieces; none is without a trained token.

    Args:
        row: A rendered row.
        data: The recipe's `data` section, for `max_length` and `too_long`.
        summary: Counts what happened.

    Returns:
        No piece if the row is left out.
    """
    if not row.trained.any():
        summary.untrained += 1
        return []
    limit = data.max_length
    if limit is None or len(row.ids) <= limit:
        return [row]
    if data.too_long == "drop":
        summary.dropped += 1
        return []
    starts = range(0, len(row.ids), limit) if data.too_long == "split" else [0]
    pieces = [_piece(row, start, start + limit) for start in starts]
    kept = [piece for piece in pieces if piece.trained.any()]
    if not kept:
        summary.untrained += 1
    elif data.too_long == "truncate":
        summary.truncated += 1
    else:
        summary.split += 1
        summary.pieces += len(kept)
    return kept


def _piece(row: Tokens, start: int, end: int) -> Tokens:
    trained = row.trained[start:end].copy()
    trained[0] = False
    return Tokens(row.where, row.ids[start:end], trained)


def take_validation(
    index: RowIndex, validation: float, rng: np.random.Generator, summary: DataSummary
) -> tuple[np.ndarray, np.ndarray]:
    """Takes rows out for validation, each with all its duplicates, of which one is kept.

    Args:
        index: The rows of all sources.
        validation: `data.validation`: below 1 a share of the different rows, from 1 up a number of them.
        rng: Which ones.
        summary: Counts duplicates.

    Returns:
        The rows to train on and those to validate on, in the order of the sources: numbers, int64.

    Raises:
        DataError: No row would be left to train on.
    """
    rows = np.arange(len(index.source))
    _, first, group = np.unique(index.digest, return_index=True, return_inverse=True)
    count = len(first)
    summary.duplicates = len(rows) - count
    target = int(validation) if validation >= 1 else round(validation * count)
    if 0 < validation < 1 and not target:
        target = 1
    if target >= count and (validation >= 1 or count > 1):
        raise DataError(
            f"`data.validation` holds out {target} rows of {count} different ones: none is left to train on",
            hint="lower `data.validation`, or set it to 0",
        )
    if not target or count == 1:
        return rows, rows[:0]
    by_appearance = np.argsort(first)  # groups in the order of their first rows
    chosen = by_appearance[np.sort(rng.permutation(count)[:target])]
    held_out = np.isin(group, chosen)
    summary.validation_duplicates = int(held_out.sum()) - target
    return rows[~held_out], first[chosen]


def weighted(rows: np.ndarray, weight: float, seed: tuple[int, int]) -> np.ndarray:
    """The training rows of a source for one epoch: each of its rows `weight` times.

    Args:
        rows: (n,) numbers of the rows.
        weight: The source's weight.
        seed: Which rows the share of one more copy takes.
    """
    if not len(rows):
        return rows
    copies, rest = divmod(max(1, round(len(rows) * weight)), len(rows))
    share = np.sort(np.random.default_rng(seed).permutation(len(rows))[:rest])
    return np.concatenate([np.tile(rows, copies), rows[share]])
