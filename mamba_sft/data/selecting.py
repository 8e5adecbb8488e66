"""Which rows, or parts of rows, are trained on: the length limit, the validation split and the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from mamba_sft.data.summary import DataSummary, SourceSummary
from mamba_sft.data.tokenizing import Tokens
from mamba_sft.errors import DataError

if TYPE_CHECKING:
    from mamba_sft.recipe.fields import DataSection, SourceSection


@dataclass
class SourceRows:
    """A source's rows after rendering and fitting: each row is one piece, or several if it was split."""

    section: SourceSection
    summary: SourceSummary
    rows: list[list[Tokens]] = field(default_factory=list)


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
    sources: list[SourceRows], validation: float, rng: np.random.Generator, summary: DataSummary
) -> list[Tokens]:
    """Takes rows out of `sources` for validation, each with all its duplicates, of which one is kept.

    Args:
        sources: All sources; changed in place.
        validation: `data.validation`: below 1 a share of the different rows, from 1 up a number of them.
        rng: Which ones.
        summary: Counts duplicates.

    Returns:
        The pieces of the validation rows, in the order of the sources.

    Raises:
        DataError: No row would be left to train on.
    """
    groups: dict[bytes, list[tuple[int, int]]] = {}
    for i, source in enumerate(sources):
        for j, row in enumerate(source.rows):
            groups.setdefault(_digest(row), []).append((i, j))
    summary.duplicates = sum(map(len, groups.values())) - len(groups)
    target = int(validation) if validation >= 1 else round(validation * len(groups))
    if 0 < validation < 1 and not target:
        target = 1
    if target >= len(groups) and (validation >= 1 or len(groups) > 1):
        raise DataError(
            f"`data.validation` holds out {target} rows of {len(groups)} different ones: none is"
            " left to train on",
            hint="lower `data.validation`, or set it to 0",
        )
    if not target or len(groups) == 1:
        return []
    places = list(groups.values())
    chosen = [places[k] for k in sorted(rng.permutation(len(places))[:target].tolist())]
    taken = [piece for (i, j), *_ in chosen for piece in sources[i].rows[j]]
    summary.validation_duplicates = sum(map(len, chosen)) - len(chosen)
    gone = {place for group in chosen for place in group}
    for i, source in enumerate(sources):
        source.rows = [row for j, row in enumerate(source.rows) if (i, j) not in gone]
    return taken


def _digest(row: list[Tokens]) -> bytes:
    return blake2b(b"".join(piece.ids.tobytes() for piece in row), digest_size=16).digest()


def weighted(source: SourceRows, seed: tuple[int, int]) -> list[Tokens]:
    """The training pieces of a source for one epoch: its rows `weight` times."""
    count = len(source.rows)
    if not count:
        return []
    wanted = max(1, round(count * source.section.weight))
    copies, rest = divmod(wanted, count)
    share = np.random.default_rng(seed).permutation(count)[:rest]
    order = [*range(count)] * copies + sorted(share.tolist())
    source.summary.train_rows = len(order)
    return [piece for index in order for piece in source.rows[index]]
