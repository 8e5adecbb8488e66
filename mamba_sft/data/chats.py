"""The turns of a conversation: roles, contents, and the orders that make sense to train on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

Message = dict[str, Any]

OPENAI_ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool",
}  # fmt: skip
SHAREGPT_ROLES = OPENAI_ROLES | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRowError(Exception):
    """A row that cannot be trained on; its text is the reason."""


@dataclass
class Chat:
    """A conversation that ends with an assistant turn.

    Args:
        messages: `{"role", "content"}` and maybe `tool_calls`; roles are system, user, assistant and tool.
        tools: JSON schemas of the tools on offer, or None.
        untrained_turns: Assistant turns at the beginning that are context only.
        trimmed: Turns left out at the end because no assistant turn follows them.
    """

    messages: list[Message]
    tools: list[Message] | None = None
    untrained_turns: int = 0
    trimmed: int = 0


def read_turns(column: str, turns: Any) -> list[Any]:
    """The turns in a column: a list, a list as JSON text, or Arrow's object of lists.

    Raises:
        BadRowError: It is none of these, or empty.
    """
    turns = from_json(turns)
    if isinstance(turns, dict) and all(isinstance(values, list) for values in turns.values()):
        turns = [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list):
        raise BadRowError(f"`{column}` is {kind_of(turns)}, not a list")
    if not turns:
        raise BadRowError(f"`{column}` is empty")
    return turns


def read_message(number: int, turn: Any, roles: dict[str, str], role_key: str, content_key: str) -> Message:
    """One turn as `{"role", "content"}`, with its `tool_calls`.

    Args:
        number: Its place in the conversation, from 1, for messages.
        turn: As the row has it.
        roles: Names of roles in this format, and the roles they mean.
        role_key: Where the role is.
        content_key: Where the content is: text, or a list of parts that are all text.

    Raises:
        BadRowError: It is not such a turn.
    """
    if not isinstance(turn, dict):
        raise BadRowError(f"turn {number} is {kind_of(turn)}, not {{{role_key}, {content_key}}}")
    name = turn.get(role_key)
    if not isinstance(name, str) or name not in roles:
        close = get_close_matches(str(name), roles, n=1)
        suggestion = f"did you mean `{close[0]}`?" if close else f"roles are {', '.join(roles)}"
        raise BadRowError(f"turn {number}: unknown role {name!r}; {suggestion}")
    message: Message = {"role": roles[name], "content": _content(number, turn.get(content_key))}
    calls = from_json(turn.get("tool_calls"))
    if calls:
        message["tool_calls"] = _checked_calls(number, calls if isinstance(calls, list) else [calls])
    return message


def _content(number: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else kind_of(part)
                raise BadRowError(f"turn {number}: a content part is {kind!r}; only text can be trained on")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRowError(f"turn {number}: content is {kind_of(content)}, not text")
    return content


def _checked_calls(number: int, calls: list[Any]) -> list[Message]:
    for call in calls:
        function = (call.get("function") or call) if isinstance(call, dict) else {}
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise BadRowError(f"turn {number}: a tool call without a function name: {call!r}")
    return calls


def read_tools(tools: Any) -> list[Message] | None:
    """The tools on offer: a list of JSON schemas, or that as JSON text; None where there are none.

    Raises:
        BadRowError: It is something else.
    """
    tools = from_json(tools)
    if not tools:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRowError(f"`tools` is {kind_of(tools)}, not a list of JSON schemas")
    return tools


def make_chat(messages: list[Message], tools: list[Message] | None = None) -> Chat:
    """Checks the order of turns and that they say something.

    Several user turns in a row are fine. An empty system turn counts as none; turns after the last answer are
    left out.

    Raises:
        BadRowError: A turn is empty or where it makes no sense, or there is no assistant turn.
    """
    if messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    before = None
    for number, message in enumerate(messages, start=1):
        _check_place(f"turn {number}", message["role"], before)
        before = message["role"]
        empty = not message["content"].strip() and "tool_calls" not in message
        if empty and before in ("user", "assistant"):
            raise BadRowError(f"turn {number} ({before}): empty content")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRowError("no assistant turn, so nothing to train on")
    kept = messages[: answers[-1] + 1]
    return Chat(kept, tools, trimmed=len(messages) - len(kept))


def _check_place(turn: str, role: str, before: str | None) -> None:
    if role == "system" and before:
        raise BadRowError(f"{turn}: a system turn must come first, this one follows {before}")
    if role == "assistant" and before in (None, "assistant"):
        follows = "follows another" if before else "comes first"
        raise BadRowError(f"{turn}: an assistant turn that {follows}: no turn asks for it")
    if role == "tool" and before not in ("assistant", "tool"):
        raise BadRowError(f"{turn}: a tool turn must follow the assistant's call, not {before or 'nothing'}")


def check_text(messages: list[Message], control_tokens: re.Pattern[str] | None) -> None:
    """Checks that no message holds what the template would take for its own, or what UTF-8 cannot hold.

    Raises:
        BadRowError: One does.
    """
    for number, message in enumerate(messages, start=1):
        turn, text = f"turn {number} ({message['role']})", message["content"]
        if "tool_calls" in message:
            text += json.dumps(message["tool_calls"], ensure_ascii=False)
        found = control_tokens.search(text) if control_tokens else None
        if found:
            raise BadRowError(
                f"{turn}: holds the control token {found.group()}, which means something else there"
            )
        check_encodable(turn, text)


def check_encodable(what: str, text: str) -> None:
    """Checks that `text` can be written as UTF-8.

    Raises:
        BadRowError: It holds a lone surrogate, which JSON can express and UTF-8 cannot.
    """
    half = _HALF_SURROGATE.search(text)
    if half:
        raise BadRowError(f"{what}: \\u{ord(half.group()):04x} is half a character (a lone surrogate)")


def from_json(value: Any) -> Any:
    """A list or object written as JSON text, as CSV and some hub data sets have them; else `value` itself."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def kind_of(value: Any) -> str:
    """What a value is, in words, for messages."""
    names = {str: "a text", dict: "an object", list: "a list", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
