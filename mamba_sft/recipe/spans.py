"""How long a part of a run is: a share of it, a number of steps, or the steps that read so many tokens.

Tokens are written in one way, `20M tokens`: a number, maybe `k`, `M` or `B` behind it, and the word.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    GetPydanticSchema,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)

UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
MOST_TOKENS = 10**15
"""Falcon-Mamba's pre-training read 5.8 * 10^12."""
FORM = r"[0-9]{1,15}(\.[0-9]{1,9})?[kMB]? tokens"
_NEARLY = re.compile(
    r"(?P<number>[0-9][0-9_,]{0,20}(\.[0-9]{1,9})?)\s*(?P<unit>k|m|b|g|million|billion)?\s*"
    r"(?P<word>tokens?|toks?|t)?",
    re.IGNORECASE,
)
_EXAMPLE = "`20M tokens`"


def token_count(text: str) -> int:
    """Returns the number that `20M tokens` says.

    Raises:
        ValueError: It is not written so, or is no whole number of tokens from 1 up.
    """
    if not re.fullmatch(FORM, text):
        meant = _meant(text)
        how = f"write `{meant}`" if meant else f"tokens are written {_EXAMPLE}"
        raise ValueError(f"must be a number, or of tokens: {how}")
    number = text.removesuffix(" tokens")
    unit = number[-1] if number[-1] in UNITS else ""
    count = Decimal(number.removesuffix(unit)) * UNITS[unit]
    if count != int(count) or not 1 <= count <= MOST_TOKENS:
        raise ValueError(f"must be a whole number of tokens, from 1 to {MOST_TOKENS:,}")
    return int(count)


def tokens_text(count: int) -> str:
    """Returns a number of tokens as recipes write it: `1500000` is `1.5M tokens`."""
    unit = next(unit for unit in reversed(UNITS) if count >= UNITS[unit] and count * 1000 % UNITS[unit] == 0)
    return f"{Decimal(count) / UNITS[unit]:f}{unit} tokens"


def _meant(text: str) -> str | None:
    """What a text that is nearly a number of tokens should have been."""
    found = _NEARLY.fullmatch(text.strip()[:60])
    if found is None:
        return None
    unit = {"k": "k", "m": "M", "b": "B", "g": "B"}.get((found["unit"] or "")[:1].lower(), "")
    count = Decimal(re.sub("[_,]", "", found["number"])) * UNITS[unit]
    if count != int(count) or not 1 <= count <= MOST_TOKENS:
        return None
    return tokens_text(int(count))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+0-9_,.eE\s]*", text) is not None


def _or_tokens(value: Any, number: ValidatorFunctionWrapHandler) -> float | str:
    if isinstance(value, str) and not _is_number(value):
        token_count(value)
        return value
    checked: float = number(value)
    return checked


def _as_written(value: float | str) -> float | int | str:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _counted(value: Any) -> Any:
    return token_count(value) if isinstance(value, str) and not _is_number(value) else value


def span_of(number: Any, *, most: int) -> Any:
    """Returns the annotation of a field that is a number as `number` is, from 0 to `most`, or tokens."""
    schema = [
        {"type": "number", "minimum": 0, "maximum": most},
        {"type": "string", "pattern": f"^{FORM}$"},
    ]
    validated = Annotated[
        number,
        Field(ge=0, le=most),
        WrapValidator(_or_tokens),
        PlainSerializer(_as_written),
        WithJsonSchema({"anyOf": schema}),
    ]
    return GetPydanticSchema(lambda _, handler: handler(validated))


TokenCount = Annotated[
    int,
    Field(ge=1, le=MOST_TOKENS),
    BeforeValidator(_counted),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS},
                {"type": "string", "pattern": f"^{FORM}$"},
            ]
        }
    ),
]
"""A number of tokens, plain or written as `20M tokens`."""
