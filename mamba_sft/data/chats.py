"""A conversation to train on: turns in an order that makes sense, and which answers are only context."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mamba_sft.data.notes import (
    ASSISTANT_FIRST,
    CONTEXT,
    SYSTEM_JOINED,
    SYSTEM_LATER,
    TOOLS_LISTED,
    WEIGHT_ZERO,
    Notes,
)
from mamba_sft.data.turns import Message, Turn
from mamba_sft.data.values import BadRowError

_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Chat:
    """A conversation that ends with an assistant turn.

    Args:
        messages: `{"role", "content"}` and maybe `tool_calls`, `reasoning_content`; roles are system, user,
            assistant and tool.
        tools: JSON schemas of the tools on offer, or None.
        context: Which assistant turns, counted from 0, are not trained.
        masked: Those of them that are not even trained where every token is, because the row says so.
        masked_others: A turn of another role that the row says is not trained, by its number, or None.
        trimmed: Turns left out at the end because no assistant turn follows them.
        notes: What else was done.
    """

    messages: list[Message]
    tools: list[Message] | None = None
    context: frozenset[int] = frozenset()
    masked: frozenset[int] = frozenset()
    masked_others: int | None = None
    trimmed: int = 0
    notes: Notes = field(default_factory=Notes)


@dataclass
class LeftOut:
    """A row that says itself that it takes no part; `notes` has the reason."""

    notes: Notes


def make_chat(
    turns: Sequence[Turn], notes: Notes, *, tools: Sequence[Message] = (), context: int = 0
) -> Chat | LeftOut:
    """Checks the order of turns and that they say something.

    Several user turns in a row are fine, and a system turn may stand anywhere. Leading system turns are
    joined, empty ones count as none; turns after the last answer are left out.

    Args:
        turns: All of them.
        notes: Gets what was done with them.
        tools: JSON schemas of the tools on offer.
        context: Turns at the beginning that are context, whatever they are.

    Raises:
        BadRowError: A turn is empty or where it makes no sense, or there is no answer to train on.
    """
    asked = [turn for turn in turns if not _is_empty_system(turn.message)]
    context -= len(turns) - len(asked)
    context -= len(asked) - len(joined := _join_leading_system(asked, notes))
    opening = _check_order(joined, notes)
    answers = [i for i, turn in enumerate(joined) if turn.message["role"] == "assistant"]
    if not answers:
        raise BadRowError("no assistant turn, so nothing to train on")
    masked = frozenset(k for k, i in enumerate(answers) if joined[i].trained is False)
    untrained = masked.union(k for k, i in enumerate(answers) if i < context or i == opening)
    if len(untrained) == len(answers):
        if not masked:
            raise BadRowError("no turn asks for its only answer, so nothing to train on")
        notes.note(WEIGHT_ZERO)
        return LeftOut(notes)
    if masked:
        notes.note(CONTEXT)
    messages = [turn.message for turn in joined]
    kept = messages[: answers[-1] + 1]
    offered = _offered(kept, tools, notes)
    others = (turn.number for turn in joined if turn.trained is False and turn.message["role"] != "assistant")
    return Chat(kept, offered, untrained, masked, next(others, None), len(messages) - len(kept), notes)


def _is_empty_system(message: Message) -> bool:
    return message["role"] == "system" and not message["content"].strip()


def _join_leading_system(turns: list[Turn], notes: Notes) -> list[Turn]:
    count = next((i for i, turn in enumerate(turns) if turn.message["role"] != "system"), len(turns))
    if count < 2:
        return turns
    texts = dict.fromkeys(turn.message["content"] for turn in turns[:count])
    if len(texts) > 1:
        notes.note(SYSTEM_JOINED)
    return [Turn(turns[0].message | {"content": "\n\n".join(texts)}, number=turns[0].number), *turns[count:]]


def _check_order(turns: Sequence[Turn], notes: Notes) -> int | None:
    """Returns the place of an assistant turn that nobody asked for, because it begins the chat."""
    before: Turn | None = None
    opening, heard = None, False
    for place, turn in enumerate(turns):
        role, previous = turn.message["role"], before.message["role"] if before else None
        if role == "assistant" and before and previous == "assistant":
            raise BadRowError(_twice(turn, before))
        if role == "assistant" and not heard and opening is None:
            opening = place
            notes.note(ASSISTANT_FIRST)
        if role == "tool" and previous not in ("assistant", "tool"):
            follows = f"not {previous or 'nothing'}"
            raise BadRowError(f"turn {turn.number}: a tool turn must follow the assistant's call, {follows}")
        if role == "system" and place:
            notes.note(SYSTEM_LATER)
        says = turn.message["content"].strip() or turn.message.keys() & {"tool_calls", "reasoning_content"}
        if not says and role in ("user", "assistant"):
            raise BadRowError(f"turn {turn.number} ({role}): empty content")
        heard = heard or role in ("user", "tool")
        before = turn
    return opening


def _twice(turn: Turn, before: Turn) -> str:
    if "tool_calls" in before.message:
        return f"turn {turn.number}: the call in turn {before.number} has no tool turn with what it returned"
    return f"turn {turn.number}: an assistant turn that follows another: no turn asks for it"


def _offered(messages: Sequence[Message], tools: Sequence[Message], notes: Notes) -> list[Message] | None:
    if tools and messages[0]["role"] == "system" and "<tools>" in messages[0]["content"]:
        notes.note(TOOLS_LISTED)
        return None
    return list(tools) or None


def check_text(chat: Chat) -> None:
    """Checks that no message holds what UTF-8 cannot hold.

    Raises:
        BadRowError: One does.
    """
    for number, message in enumerate(chat.messages, start=1):
        text = message["content"]
        if len(message) > 2:
            text += "".join(message.get(key, "") for key in ("reasoning_content", "name", "tool_call_id"))
        if "tool_calls" in message:
            text += _as_json(message["tool_calls"])
        check_encodable(f"turn {number} ({message['role']})", text)
    if chat.tools:
        check_encodable("`tools`", _as_json(chat.tools))


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError as error:
        raise BadRowError("holds JSON that is nested too deeply") from error


def check_encodable(what: str, text: str) -> None:
    """Checks that `text` can be written as UTF-8.

    Raises:
        BadRowError: It holds a lone surrogate, which JSON can express and UTF-8 cannot.
    """
    half = _HALF_SURROGATE.search(text)
    if half:
        raise BadRowError(f"{what}: \\u{ord(half.group()):04x} is half a character (a lone surrogate)")
