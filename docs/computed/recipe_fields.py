"""The reference of a recipe's fields, from its JSON schema: what `mamba-sft recipes schema` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mamba_sft.recipe.recipe import recipe_schema

Schema = dict[str, Any]
WITHOUT_BOUND = 1_000_000_000
"""What the schema has as a bound where a number has no natural one."""


def text() -> str:
    """Returns a heading and a table for every section, in the order of a recipe."""
    schema = recipe_schema()
    return "\n".join(_section("", schema, schema["$defs"]))


def _section(path: str, section: Schema, known: dict[str, Schema]) -> Iterator[str]:
    """The table of a section, then those of the sections in it; `path` is as overrides write it."""
    inner = []
    yield f"## `{path}`\n" if path else "## At the top\n"
    yield f"{section.get('description', '')}\n" if path else "Beside these, the sections below.\n"
    yield "| field | values | default | |"
    yield "|---|---|---|---|"
    for name, field in section["properties"].items():
        found, repeated = _section_in(field)
        if found:
            inner.append((f"{path}.{name}".lstrip(".") + (".0" if repeated else ""), known[found]))
            if not path and "description" not in field:
                continue
        missing = name in section.get("required", ())
        default = "" if missing else _default(field)
        yield f"| `{name}` | {_values(field)} | {default or '*needed*'} | {_prose(field)} |"
    yield ""
    for where, one in inner:
        yield from _section(where, one, known)


def _section_in(field: Schema) -> tuple[str | None, bool]:
    """The name of the section that a field holds, and whether it holds a list of them."""
    for choice in (field, *field.get("anyOf", ()), *field.get("allOf", ())):
        for repeated, one in ((False, choice), (True, choice.get("items", {}))):
            if "$ref" in one:
                return one["$ref"].rpartition("/")[2], repeated
    return None, False


def _values(field: Schema) -> str:
    choices = [_kind(one) for one in field.get("anyOf", [field])]
    return " or ".join(dict.fromkeys(one for one in choices if one))


def _kind(one: Schema) -> str:
    if "const" in one:
        return f"`{one['const']}`"
    if "enum" in one:
        return ", ".join(f"`{word}`" for word in one["enum"])
    if "$ref" in one:
        return "a section"
    kind = one.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "array":
        return f"list of: {_values(one['items'])}" if one["items"] else "list"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`",
             "object": "mapping", "null": "`null`"}  # fmt: skip
    return " ".join(part for part in (words.get(kind or "", "anything"), _bounds(one)) if part)


def _bounds(one: Schema) -> str:
    low, above = one.get("minimum"), one.get("exclusiveMinimum")
    high, below = one.get("maximum"), one.get("exclusiveMaximum")
    parts = []
    if low is not None or above is not None:
        parts.append(f"from {low:,}" if low is not None else f"above {above:,}")
    if (high is not None and high < WITHOUT_BOUND) or below is not None:
        parts.append(f"to {high:,}" if high is not None else f"below {below:,}")
    return " ".join(parts)


def _default(field: Schema) -> str:
    if "default" not in field:
        return "" if not _section_in(field)[0] else "as below"
    value = field["default"]
    if isinstance(value, dict) and value:
        return "as below"
    return f"`{json.dumps(value)}`".replace('"', "")


def _prose(field: Schema) -> str:
    return " ".join(field.get("description", "").split()).replace("|", "\\|")
