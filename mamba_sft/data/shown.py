"""What a reader sees of the rows, as JSON can hold it: for `mamba-sft data --json`, and kept with a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mamba_sft.data.preparing import PreparedData
from mamba_sft.data.rows import IGNORED

_RANGES = 12


def shown_rows(data: PreparedData, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Returns the first `count` training rows: where from, text, what of it is trained, ids and labels."""
    shown = []
    for i in range(min(count, len(data.train))):
        row = data.train[i]
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        shown.append(
            {
                "where": row["where"],
                "text": tokenizer.decode(row["input_ids"]),
                "trained_text": tokenizer.decode([token for token, label in pairs if label != IGNORED]),
                "input_ids": row["input_ids"],
                "labels": row["labels"],
            }
        )
    return shown


def length_histogram(lengths: np.ndarray) -> dict[str, Any]:
    """Returns how many rows have 1 to `width` tokens, up to twice as many, and so on, in about ten ranges.

    Args:
        lengths: Tokens of each row, (n,).

    Returns:
        `width`, `counts`, `median`, `percentile_95` and `longest`; nothing if there are no rows.
    """
    if not len(lengths):
        return {}
    values, width = lengths, 1
    while values.max() > _RANGES * width:  # powers of two, as limits are
        width *= 2
    return {
        "width": width,
        "counts": np.bincount((values - 1) // width).tolist(),
        "median": int(np.percentile(values, 50)),
        "percentile_95": int(np.percentile(values, 95)),
        "longest": int(values.max()),
    }


def shown_tokens(
    tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int], limit: int
) -> Iterator[tuple[list[int], bool]]:
    """Yields tokens and whether they are trained; those that only together make a character are one.

    Args:
        tokenizer: Decodes the ids.
        input_ids: (L,)
        labels: (L,) -100 where a token is not trained.
        limit: Tokens shown; of a longer row the middle is left out, and an empty list stands for it.
    """
    return _units(tokenizer, *_shortened(input_ids, labels, limit))


def _shortened(
    input_ids: Sequence[int], labels: Sequence[int], limit: int
) -> tuple[list[int | None], list[bool]]:
    """Ids and whether they are trained; None stands for the middle of a long row."""
    ids: list[int | None] = list(input_ids)
    trained = [label != IGNORED for label in labels]
    if len(ids) <= limit:
        return ids, trained
    head = limit * 2 // 3
    tail = limit - head
    return [*ids[:head], None, *ids[-tail:]], [*trained[:head], False, *trained[-tail:]]


def _units(
    tokenizer: Any, ids: Sequence[int | None], trained: Sequence[bool]
) -> Iterator[tuple[list[int], bool]]:
    """Tokens, those joined that only together make a character; an empty list for the middle left out."""
    held: list[int] = []
    for index, (token, is_trained) in enumerate(zip(ids, trained, strict=True)):
        if token is None:
            yield [], False
            continue
        held.append(token)
        last = index + 1 == len(ids) or ids[index + 1] is None or trained[index + 1] != is_trained
        if last or len(held) == 4 or "\ufffd" not in tokenizer.decode(held):
            yield held, is_trained
            held = []
