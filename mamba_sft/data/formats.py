"""What the columns of a row mean: five formats, recognised by looking at the rows.

Every format becomes one of two things: a `Chat`, which the chat template renders, or a `Passage` of plain
text, which it does not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mamba_sft.data.chats import (
    OPENAI_ROLES,
    SHAREGPT_ROLES,
    BadRowError,
    Chat,
    check_encodable,
    check_text,
    kind_of,
    make_chat,
    read_message,
    read_tools,
    read_turns,
)
from mamba_sft.errors import DataError

LOOKED_AT = 50
"""Rows of a file that are looked at to recognise its format."""

NEEDS = {
    "messages": "`messages`: a list of {role, content}",
    "sharegpt": "`conversations`: a list of {from, value}",
    "alpaca": "`instruction` and `output`, with `input` and `system` where they apply",
    "prompt_completion": "`prompt` and `completion`: two texts, or two lists of {role, content}",
    "text": "`text`",
}
_TURN_COLUMNS = ("messages", "conversations", "conversation")


@dataclass
class Passage:
    """Plain text, outside the chat template: `text` is trained, a stop token behind it; `prompt` is not."""

    text: str
    prompt: str = ""


def detect(row: dict[str, Any]) -> str | None:
    """The format a row's columns fit, or None. Chats win over `text`: many data sets carry both."""
    for column in _TURN_COLUMNS:
        if column in row:
            turns = row[column]
            first = turns[0] if isinstance(turns, list) and turns else turns
            names = set(first) if isinstance(first, dict) else set()
            is_sharegpt = bool(names & {"from", "value"}) if names else column != "messages"
            return "sharegpt" if is_sharegpt else "messages"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    return "text" if "text" in row else None


def detect_file(file: str, rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The format most of `rows` fit, and a sentence saying what was seen.

    Args:
        file: Its name, for the sentence.
        rows: The first `LOOKED_AT` readable rows of the file.

    Raises:
        DataError: None of them fits any format.
    """
    formats = Counter(found for found in map(detect, rows) if found)
    columns = Counter(key for row in rows for key in row)
    count = f"first {len(rows)} rows" if len(rows) > 1 else "only row"
    seen = f"looked at the {count} of `{file}`: columns {_listed(columns)}"
    if not formats:
        raise DataError(
            f"{seen}; no format has these",
            hint="rows need " + "; or ".join(NEEDS.values()),
        )
    (best, fitting), *others = formats.most_common()
    mixed = f" (others look like {', '.join(name for name, _ in others)})" if others else ""
    return best, f"{seen}; {fitting} fit {best}{mixed}"


def parse(
    row: dict[str, Any], expected: str, control_tokens: re.Pattern[str] | None = None
) -> Chat | Passage:
    """Reads a row as the format `expected`.

    Args:
        row: Its columns.
        expected: One of `NEEDS`.
        control_tokens: What must not occur in a chat's messages, because the template gives it a meaning.

    Raises:
        BadRowError: It is not that format, or cannot be trained on.
    """
    found = detect(row)
    if expected != found and not _has_columns(row, expected):
        looks = f"it looks like {found}" if found else f"its columns are {_listed(row)}"
        raise BadRowError(f"not {expected}: {looks}; {expected} needs {NEEDS[expected]}")
    example = _PARSERS[expected](row)
    if isinstance(example, Chat):
        check_text(example.messages, control_tokens)
    else:
        check_encodable("text", example.prompt + example.text)
    return example


def _has_columns(row: dict[str, Any], expected: str) -> bool:
    if expected in ("messages", "sharegpt"):
        return any(column in row for column in _TURN_COLUMNS) and detect(row) == expected
    needed = {
        "alpaca": ("instruction", "output"),
        "prompt_completion": ("prompt", "completion"),
        "text": ("text",),
    }
    return all(column in row for column in needed[expected])


def _parse_turns(row: dict[str, Any], roles: dict[str, str], role_key: str, content_key: str) -> Chat:
    column = next(column for column in _TURN_COLUMNS if column in row)
    turns = read_turns(column, row[column])
    messages = [read_message(i, turn, roles, role_key, content_key) for i, turn in enumerate(turns, start=1)]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return make_chat(messages, tools=read_tools(row.get("tools")))


def _parse_messages(row: dict[str, Any]) -> Chat:
    return _parse_turns(row, OPENAI_ROLES, "role", "content")


def _parse_sharegpt(row: dict[str, Any]) -> Chat:
    return _parse_turns(row, SHAREGPT_ROLES, "from", "value")


def _parse_alpaca(row: dict[str, Any]) -> Chat:
    instruction, extra = _text(row, "instruction"), _text(row, "input", optional=True)
    asked = "\n\n".join(part for part in (instruction, extra) if part.strip())
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(row, "output")}]
    system = _text(row, "system", optional=True)
    if system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return make_chat(messages)


def _parse_prompt_completion(row: dict[str, Any]) -> Chat | Passage:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise BadRowError("`completion` is empty")
        return Passage(completion, prompt)
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise BadRowError(
            f"`prompt` and `completion` are {kinds}: both must be texts, or both lists of messages"
        )
    context = [
        read_message(i, turn, OPENAI_ROLES, "role", "content") for i, turn in enumerate(prompt, start=1)
    ]
    answer = [
        read_message(i, turn, OPENAI_ROLES, "role", "content")
        for i, turn in enumerate(completion, start=len(context) + 1)
    ]
    if not any(message["role"] == "assistant" for message in answer):
        raise BadRowError("`completion` has no assistant turn")
    chat = make_chat(context + answer, tools=read_tools(row.get("tools")))
    chat.untrained_turns = sum(message["role"] == "assistant" for message in context)
    return chat


def _parse_text(row: dict[str, Any]) -> Passage:
    text = _text(row, "text")
    if not text.strip():
        raise BadRowError("`text` is empty")
    return Passage(text)


_PARSERS = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
    "prompt_completion": _parse_prompt_completion,
    "text": _parse_text,
}


def _text(row: dict[str, Any], column: str, *, optional: bool = False) -> str:
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise BadRowError(f"`{column}` is {kind_of(value)}, not text")
    return value


def _listed(names: Any) -> str:
    shown = [f"`{name}`" for name in list(names)[:12]]
    return ", ".join(shown) + (", ..." if len(names) > 12 else "") if shown else "(none)"
