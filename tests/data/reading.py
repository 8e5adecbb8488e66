"""Rows read as the pipeline reads them, for tests of single rules."""

from __future__ import annotations

from typing import Any

from mamba_sft.data.chats import Chat
from mamba_sft.data.formats import Reading, detect, parse
from mamba_sft.data.roles import known_roles
from mamba_sft.data.turns import TurnRules

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def reading(**said: Any) -> Reading:
    """What a recipe says of a source: `columns`, `roles`, `preference`, and `reasoning` of the chat."""
    rules = TurnRules(
        known_roles(said.get("roles", {})), said.get("reasoning") != "drop", said.get("names", False)
    )
    return Reading(said.get("columns", {}), rules, said.get("preference") == "chosen")


def read(row: dict[str, Any], **said: Any) -> Any:
    """The row in the format it looks like."""
    how = reading(**said)
    found = detect(row, how.columns)
    assert found is not None, f"{row} is recognised as nothing"
    return parse(row, said.get("format", found), how)


def chat_of(row: dict[str, Any], **said: Any) -> Chat:
    """The row, which must be a chat."""
    found = read(row, **said)
    assert isinstance(found, Chat)
    return found


def turns_of(row: dict[str, Any], **said: Any) -> list[tuple[str, str]]:
    """Role and content of each turn."""
    return [(message["role"], message["content"]) for message in chat_of(row, **said).messages]
