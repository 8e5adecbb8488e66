"""The turns of a row, in whatever shape, as messages: `{"role", "content"}`, with calls and reasoning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mamba_sft.data.keys import FLAGS, is_trained, note_unused, refuse_media
from mamba_sft.data.notes import REASONING_DROPPED, REASONING_KEPT, Notes
from mamba_sft.data.roles import CALLING, ROLES, fold_role, read_role
from mamba_sft.data.tool_calls import read_calls, split_calls, split_results
from mamba_sft.data.values import BadRowError, from_json, is_empty, kind_of, python_list

Message = dict[str, Any]

ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text", "message")
ASKS = ("human", "user", "instruction", "prompt", "question", "query", "input")
ANSWERS = ("assistant", "gpt", "bot", "output", "completion", "response", "answer")
"""Keys of a turn that holds a question together with its answer."""

REASONING = ("reasoning_content", "thinking", "reasoning")
_READ = frozenset((*FLAGS, "name"))
_READ_OF_ANSWERS = _READ.union((*REASONING, "tool_calls", "function_call", "refusal"))
_FLAG_WORDS = frozenset(("on", "off", "true", "false", "yes", "no", "low", "medium", "high"))


@dataclass(frozen=True)
class TurnRules:
    """How the turns of a source are read.

    Args:
        roles: Folded name -> role; see `roles.known_roles`.
        keeps_reasoning: Whether reasoning is trained; else it is left out.
        keeps_names: Whether the chat template says who a turn's `name` is.
    """

    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    keeps_reasoning: bool = True
    keeps_names: bool = False


@dataclass
class Turn:
    """A message, whether an answer is trained (None: nobody said), and its place in the row."""

    message: Message
    trained: bool | None = None
    number: int = 1


def read_turns(column: str, turns: Any) -> list[Any]:
    """The turns in a column: a list, a list as JSON text, or Arrow's object of lists.

    Raises:
        BadRowError: It is none of these, or empty.
    """
    turns = from_json(turns, f"`{column}`")
    if python_list(turns) or (isinstance(turns, str) and turns.lstrip().startswith("[{'")):
        raise BadRowError(
            f"`{column}` is a Python list written as text, not JSON; pandas writes JSON with"
            " `df.to_json('data.jsonl', orient='records', lines=True)`"
        )
    if isinstance(turns, dict) and turns and all(isinstance(values, list) for values in turns.values()):
        turns = [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list):
        raise BadRowError(f"`{column}` is {kind_of(turns)}, not a list")
    if not turns:
        raise BadRowError(f"`{column}` is empty")
    return turns


def read_messages(turns: list[Any], rules: TurnRules, notes: Notes, start: int = 1) -> list[Turn]:
    """Reads turns one by one.

    Args:
        turns: As the row has them.
        rules: How.
        notes: Gets what was seen on the way.
        start: The number of the first one, for messages.

    Raises:
        BadRowError: One of them is no turn.
    """
    read: list[Turn] = []
    for number, turn in enumerate(turns, start=start):
        plain = _plain_turn(number, turn, rules)
        if plain is not None:
            read.append(plain)
            continue
        for one in _expanded(number, turn):
            read += _read_turn(number, one, rules, notes)
    return read


def _plain_turn(number: int, turn: Any, rules: TurnRules) -> Turn | None:
    """A turn of a role and a text and nothing else, as nearly all are; None where more has to be asked."""
    if not isinstance(turn, dict) or len(turn) != 2:
        return None
    name, content = turn.get("role"), turn.get("content")
    if name is None:
        name, content = turn.get("from"), turn.get("value")
    if not (isinstance(name, str) and isinstance(content, str)):
        return None
    role = rules.roles.get(name)
    if role is None or role == "tool" or name in CALLING:
        return None
    if role == "assistant" and ("</tool_call>" in content or "</think>" in content):
        return None
    return Turn({"role": role, "content": content}, number=number)


def looks_like_turns(value: Any) -> bool:
    """Whether a value is a list of turns, maybe as JSON text, and nothing that a text might be."""
    try:
        read = from_json(value)
    except BadRowError:
        return False
    return (
        isinstance(read, list)
        and bool(read)
        and all(
            isinstance(turn, dict) and _key(turn, ROLE_KEYS) and _key(turn, CONTENT_KEYS, *_CALLS)
            for turn in read
        )
    )


_CALLS = ("tool_calls", "function_call")


def _key(turn: Mapping[str, Any], *names: Any) -> str | None:
    return next((name for name in (*names[0], *names[1:]) if name in turn), None)


def _expanded(number: int, turn: Any) -> Iterator[dict[str, Any]]:
    """A turn as one or two with role and content: `{human, assistant}` and `[question, answer]` are two."""
    turn = from_json(turn)
    if isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
        yield from ({"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]})
    elif not isinstance(turn, dict):
        raise BadRowError(f"turn {number} is {kind_of(turn)}, not an object with `role` and `content`")
    elif _key(turn, ROLE_KEYS) is not None:
        yield turn
    else:
        yield from _pair(number, turn)


def _pair(number: int, turn: dict[str, Any]) -> Iterator[dict[str, Any]]:
    names = {fold_role(str(key)): key for key in turn}
    asked = next((names[key] for key in ASKS if key in names), None)
    answered = next((names[key] for key in ANSWERS if key in names), None)
    if asked is None and answered is None:
        keys = ", ".join(f"`{key}`" for key in turn) or "none"
        raise BadRowError(
            f"turn {number} has no `role`; its keys are {keys}, instead of `role` and `content`"
        )
    rest = {key: value for key, value in turn.items() if key not in (asked, answered, names.get("system"))}
    if "system" in names:
        yield {"role": "system", "content": turn[names["system"]]}
    if asked is not None:
        yield {"role": "user", "content": turn[asked]} | ({} if answered is not None else rest)
    if answered is not None:
        yield {"role": "assistant", "content": turn[answered]} | rest


def _read_turn(number: int, turn: dict[str, Any], rules: TurnRules, notes: Notes) -> list[Turn]:
    what = f"turn {number}"
    role_key, content_key = _key(turn, ROLE_KEYS), _key(turn, CONTENT_KEYS)
    name = turn[role_key] if role_key else None
    role = read_role(number, name, rules.roles)
    refuse_media(f"{what}: ", turn)
    trained = is_trained(what, turn)
    note_unused(
        "turn",
        turn,
        {*(_READ_OF_ANSWERS if role == "assistant" else _READ), str(role_key), str(content_key)},
        notes,
    )
    if role == "assistant":
        message = _read_answer(what, turn, fold_role(str(name)) in CALLING, content_key, notes)
        _settle_reasoning(message, rules, notes)
    else:
        message = {
            "role": role,
            "content": read_content(what, turn.get(content_key) if content_key else None)[0],
        }
    _keep_name(turn, message, rules, notes)
    if role != "tool":
        return [Turn(message, trained, number)]
    identity = turn.get("tool_call_id")
    link = {"tool_call_id": identity} if isinstance(identity, str) and identity else {}
    return [
        Turn({**message, "content": text} | link, trained, number)
        for text in split_results(message["content"])
    ]


def _read_answer(
    what: str, turn: dict[str, Any], is_call: bool, content_key: str | None, notes: Notes
) -> Message:
    value = turn.get(content_key) if content_key else None
    calls = [call for key in _CALLS for call in read_calls(what, turn.get(key), notes)]
    if is_call:
        content, thought = "", ""
        calls = read_calls(what, value, notes) + calls
    else:
        content, thought = read_content(what, value)
        if not calls and content.rstrip().endswith("</tool_call>"):
            content, calls = split_calls(what, content, notes)
    refusal = turn.get("refusal")
    if isinstance(refusal, str) and refusal.strip():
        if content.strip() and content != refusal:
            raise BadRowError(f"{what}: has both `content` and `refusal`; an answer is one of them")
        content = refusal
    message: Message = {"role": "assistant", "content": content}
    reasoning = "\n\n".join(text for text in (thought, read_reasoning(what, turn)) if text)
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def read_reasoning(what: str, values: Mapping[str, Any]) -> str:
    """The reasoning beside an answer; a word such as `on` says how the answer was made and is none.

    Raises:
        BadRowError: It is no text.
    """
    found = []
    for key in REASONING:
        value = values.get(key)
        if is_empty(value) or isinstance(value, bool):
            continue
        if not isinstance(value, str):
            raise BadRowError(f"{what}: `{key}` is {kind_of(value)}, not text")
        if value.strip().casefold() not in _FLAG_WORDS and value not in found:
            found.append(value)
    return "\n\n".join(found)


def _settle_reasoning(message: Message, rules: TurnRules, notes: Notes) -> None:
    """Keeps or drops the reasoning of an answer; what its text has between tags is dropped too."""
    if rules.keeps_reasoning:
        if "reasoning_content" in message:
            notes.note(REASONING_KEPT)
        return
    content = message["content"].lstrip()
    inside, closing, answer = content.partition("</think>")
    if closing and inside.startswith("<think>"):
        message["content"] = answer.lstrip()
        notes.note(REASONING_DROPPED)
    if message.pop("reasoning_content", None):
        notes.note(REASONING_DROPPED)


def _keep_name(turn: dict[str, Any], message: Message, rules: TurnRules, notes: Notes) -> None:
    name = turn.get("name")
    if is_empty(name):
        return
    if isinstance(name, str) and (rules.keeps_names or message["role"] == "tool"):
        message["name"] = name
    else:
        notes.note_unused("turn", "name")


def read_content(what: str, content: Any) -> tuple[str, str]:
    """The text of a turn, and the reasoning that stands among its parts.

    Raises:
        BadRowError: It is no text, or holds what is none.
    """
    if is_empty(content) and not isinstance(content, str):
        return "", ""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise BadRowError(f"{what}: content is {kind_of(content)}, not text")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind, text = _read_part(what, part)
        (thoughts if kind in ("thinking", "reasoning") else texts).append(text)
    return "\n\n".join(text for text in texts if text), "\n\n".join(text for text in thoughts if text)


def _read_part(what: str, part: Any) -> tuple[str, str]:
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise BadRowError(f"{what}: a content part is {kind_of(part)}; only text can be trained on")
    kind = part.get("type")
    readable = kind is None or kind in (
        "text",
        "input_text",
        "output_text",
        "refusal",
        "thinking",
        "reasoning",
    )
    text = next((part[key] for key in (str(kind), *CONTENT_KEYS) if isinstance(part.get(key), str)), None)
    if readable and text is not None:
        return str(kind or "text"), text
    if kind == "text" or kind is None:
        raise BadRowError(
            f"{what}: a text part has no `text`; its keys are {', '.join(map(str, part)) or 'none'}"
        )
    raise BadRowError(f"{what}: a content part is {kind!r}; only text can be trained on")
