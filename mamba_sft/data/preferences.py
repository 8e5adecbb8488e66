"""Preference data: rows that say which answer is good and which is not.

Training on all of it teaches the bad answers too, so it is refused until the source says `preference:
chosen`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mamba_sft.data.columns import Columns
from mamba_sft.data.keys import switch
from mamba_sft.data.values import is_empty
from mamba_sft.errors import DataError

LABELS = ("label", "kto_tag")
"""Columns that say of a row's own answer whether it is good."""

ADVICE = "set `preference: chosen` on the source"


def preference_columns(row: Mapping[str, Any], beside: Columns, *, has_answer: bool) -> list[str]:
    """The columns of a row that make it preference data.

    A `label` that is no yes or no is somebody's category, and so is one beside a text that answers nothing.
    """
    found = [
        beside[part] for part in ("chosen", "rejected") if part in beside and not is_empty(row[beside[part]])
    ]
    return found + [key for key in LABELS if has_answer and key in row and switch(row[key]) is not None]


def is_rejected(row: Mapping[str, Any]) -> bool:
    """Whether a row's label says that its answer is a bad one."""
    return any(switch(row[key]) is False for key in LABELS if key in row)


def refuse_preferences(file: str, rows: Sequence[list[str]]) -> None:
    """Refuses a file most of whose rows are preference data.

    Args:
        file: Its name.
        rows: For each row looked at, its `preference_columns`.

    Raises:
        DataError: It is.
    """
    having = [columns for columns in rows if columns]
    if 2 * len(having) <= len(rows):
        return
    columns = list(dict.fromkeys(column for row in having for column in row))
    told = " and ".join(f"`{column}`" for column in columns)
    what = "leaves out the rows whose label is false"
    if "chosen" in columns:
        what = "trains on `chosen` and leaves the other answer out"
    elif not set(columns) & set(LABELS):
        what = f"trains on the rest of the row and leaves {told} out"
    raise DataError(
        f"`{file}` is preference data: {len(having)} of the {len(rows)} rows looked at have {told},"
        " so not every answer in it is meant to be learned",
        hint=f"`preference: chosen` under `data.sources` {what}; rename {told} if that is not what it means",
    )
