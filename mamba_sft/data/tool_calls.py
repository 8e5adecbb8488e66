"""Tools and their calls in one form, whatever form a row has them in.

A call is `{"type": "function", "function": {"name", "arguments"}}`, its arguments an object; a tool on offer
is `{"type": "function", "function": {"name", "description", "parameters"}}`. Chat templates expect these.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from mamba_sft.data.keys import note_unused
from mamba_sft.data.notes import Notes
from mamba_sft.data.values import BadRowError, from_json, is_empty, kind_of
from mamba_sft.json_lines import parse_json

Call = dict[str, Any]
Tool = dict[str, Any]

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_RESULT_OPENING, _RESULT_CLOSING = "<tool_response>", "</tool_response>"
_ARGUMENTS = ("arguments", "parameters", "args", "input")


def read_calls(what: str, calls: Any, notes: Notes) -> list[Call]:
    """Calls from a list of them, from one, or from either as JSON text.

    Args:
        what: The turn, for messages.
        calls: OpenAI's `tool_calls`, its older `function_call`, or what a ShareGPT call turn says.
        notes: Gets the keys of calls that nothing reads.

    Raises:
        BadRowError: One has no name, or arguments that are not an object.
    """
    read = from_json(_unwrapped(calls)) if isinstance(calls, str) else calls
    if is_empty(read):
        return []
    if isinstance(read, str):
        raise BadRowError(f"{what}: the call is not JSON: {read.strip()!r:.80}")
    listed = read if isinstance(read, list) else [read]
    return [_read_call(what, from_json(call), notes) for call in listed]


def _unwrapped(text: str) -> str:
    text = text.strip()
    if text.startswith(_OPENING) and text.endswith(_CLOSING):
        return text[len(_OPENING) : -len(_CLOSING)].strip()
    return text


def _read_call(what: str, call: Any, notes: Notes) -> Call:
    if not isinstance(call, dict):
        raise BadRowError(f"{what}: a tool call is {kind_of(call)}, not an object with a name: {call!r:.80}")
    inner = from_json(call.get("function"))
    function = inner if isinstance(inner, dict) else {**call, "name": call.get("name") or inner}
    name = function.get("name")
    if not (isinstance(name, str) and name.strip()):
        raise BadRowError(f"{what}: a tool call without a function name: {call!r:.200}")
    key = next((key for key in _ARGUMENTS if key in function), "arguments")
    outer = call if function is inner else {}
    if key not in function and key in outer:  # the name in `function`, the arguments beside it
        function = {**function, key: outer[key]}
    note_unused("tool call", {**outer, **function}, {"function", "name", key}, notes)
    arguments = _read_arguments(f"{what}: the arguments of `{name}`", function.get(key))
    read: Call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    identity = call.get("id")
    return {"id": identity} | read if isinstance(identity, str) and identity else read


def _read_arguments(what: str, arguments: Any) -> dict[str, Any]:
    for _ in range(3):  # as it stands, as JSON text, as JSON text of JSON text
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            return {}
        if not isinstance(arguments, str):
            break
        arguments = _parse(what, arguments)
    if arguments == []:  # how PHP writes an empty object
        return {}
    if not isinstance(arguments, dict):
        raise BadRowError(f"{what} are {kind_of(arguments)}, not an object: {arguments!r:.80}")
    try:
        json.dumps(arguments, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise BadRowError(f"{what} cannot be written as JSON: {error}") from error
    return arguments


def _parse(what: str, text: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise BadRowError(f"{what} are not JSON: {error.msg}, column {error.colno}: {text!r:.80}") from error
    except ValueError as error:
        raise BadRowError(f"{what} are not JSON: {error}") from error


def split_calls(what: str, content: str, notes: Notes) -> tuple[str, list[Call]]:
    """Splits an answer that ends with calls in Hermes' `<tool_call>{...}</tool_call>` into text and calls.

    Tags anywhere else are text: somebody may be explaining them.

    Raises:
        BadRowError: What stands in the tags begins like a call and is none.
    """
    text = content.rstrip()
    calls: list[Call] = []
    while text.endswith(_CLOSING):
        start = text.rfind(_OPENING)
        body = text[start + len(_OPENING) : -len(_CLOSING)].strip()
        if start < 0 or not body.startswith(("{", "[")):
            return content, []
        calls[:0] = read_calls(what, _hermes_call(body), notes)
        text = text[:start].rstrip()
    return (text, calls) if calls else (content, [])


def _hermes_call(body: str) -> Any:
    """Some of Hermes' own data has calls as Python prints an object."""
    read = from_json(body)
    if not isinstance(read, str):
        return read
    try:
        return ast.literal_eval(body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return body


def split_results(content: str) -> list[str]:
    """What tools returned, one text each: a turn of Hermes' may hold several in `<tool_response>` tags."""
    rest, found = content.strip(), []
    while rest.startswith(_RESULT_OPENING) and _RESULT_CLOSING in rest:
        inner, _, rest = rest[len(_RESULT_OPENING) :].partition(_RESULT_CLOSING)
        found.append(inner.strip())
        rest = rest.strip()
    return [content] if rest or not found else found


def read_tools(column: str, tools: Any) -> list[Tool]:
    """The tools on offer: a list of JSON schemas, each or all of it maybe JSON text; none where nothing is.

    Raises:
        BadRowError: It is something else.
    """
    if is_empty(tools):
        return []
    read = from_json(tools, f"`{column}`")
    listed = [read] if isinstance(read, dict) else read
    if not isinstance(listed, list):
        raise BadRowError(f"`{column}` is {kind_of(read)}, not a list of JSON schemas")
    return [_read_tool(column, number, from_json(tool)) for number, tool in enumerate(listed, start=1)]


def _read_tool(column: str, number: int, tool: Any) -> Tool:
    if not isinstance(tool, dict):
        raise BadRowError(f"`{column}` entry {number} is {kind_of(tool)}, not a JSON schema: {tool!r:.80}")
    function = from_json(tool.get("function"))
    if isinstance(function, dict):
        return {**tool, "function": function}
    if not isinstance(tool.get("name"), str):
        return tool
    bare: Mapping[str, Any] = {key: value for key, value in tool.items() if key != "type"}
    if "input_schema" in bare and "parameters" not in bare:  # Anthropic's name of it
        bare = {("parameters" if key == "input_schema" else key): value for key, value in bare.items()}
    return {"type": "function", "function": dict(bare)}
