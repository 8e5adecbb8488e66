"""What a value of a row is: JSON written as text, nothing at all, and its kind in words."""

from __future__ import annotations

import ast
import math
from typing import Any

from mamba_sft.json_lines import TOO_DEEP, is_too_deep, parse_json


class BadRowError(Exception):
    """A row that cannot be trained on; its text is the reason."""


def from_json(value: Any, what: str = "a value") -> Any:
    """A list or object written as JSON text, as CSV and some hub data sets have them; else `value` itself.

    Args:
        value: Any value of a row.
        what: What it is, for messages.

    Raises:
        BadRowError: It is nested too deeply to be read.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return parse_json(value)
        except ValueError as error:
            if str(error) == TOO_DEEP:
                raise BadRowError(f"{what} is JSON {TOO_DEEP}") from error
            return value
    return value


def python_list(value: Any) -> list[Any] | None:
    """The list that a text is as Python prints it, which is how pandas writes one to CSV, or None."""
    if not (isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]")):
        return None
    try:
        read = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return read if isinstance(read, list) and not is_too_deep(read) else None


def is_nan(value: Any) -> bool:
    """Whether a value is the NaN that pandas puts where nothing was."""
    return isinstance(value, float) and math.isnan(value)


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, NaN, a blank text, a list or object without entries."""
    if isinstance(value, str):
        return not value.strip() or value.strip() in ("[]", "{}")
    return value is None or is_nan(value) or (isinstance(value, list | dict) and not value)


def kind_of(value: Any) -> str:
    """What a value is, in words, for messages."""
    names = {str: "a text", dict: "an object", list: "a list", bool: "a boolean", type(None): "null"}
    if is_nan(value):
        return "NaN"
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
