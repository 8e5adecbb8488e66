"""What a reader sees of the rows, as JSON can hold it: for `mamba-sft data --json`, and kept with a run."""

from __future__ import annotations

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
