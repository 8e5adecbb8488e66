"""Arguments of another kind than a function takes, told before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from mamba_sft.errors import UsageError


def check_kind(name: str, value: object, *kinds: type) -> None:
    """Checks that an argument is of a kind, or left out.

    Args:
        name: What it is called.
        value: What was given; None is nothing.
        kinds: The classes it may be of; the hint names the first.

    Raises:
        UsageError: It is something else; of a mapping, the hint writes the call that was meant.
    """
    if value is None or isinstance(value, kinds):
        return
    wanted = " or a ".join(f"`{kind.__name__}`" for kind in dict.fromkeys(kinds))
    fields = "..."
    if isinstance(value, Mapping) and all(isinstance(key, str) and key.isidentifier() for key in value):
        fields = ", ".join(f"{key}={entry!r}" for key, entry in value.items())
    raise UsageError(
        f"`{name}` is a {wanted}, not a `{type(value).__name__}`",
        hint=f"for example `{name}={kinds[0].__name__}({fields})`",
    )


def check_rows(rows: object) -> None:
    """Checks how many rows are to be shown.

    Raises:
        UsageError: It is no number of rows.
    """
    if not isinstance(rows, int) or rows < 0:
        raise UsageError(f"`rows` must be a whole number from 0, not {rows!r}")
