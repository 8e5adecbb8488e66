from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mamba_sft.data.notes import TOOLS_LISTED
from mamba_sft.data.values import BadRowError
from tests.data.reading import ANSWER, USER, chat_of, read, turns_of

TOOL = {"role": "tool", "content": "6"}
AREA = {"type": "function", "function": {"name": "area", "arguments": {"a": 2, "b": [3]}}}
BARE = {"name": "area", "arguments": {"a": 2, "b": [3]}}
HERMES = '<tool_call>\n{"arguments": {"a": 2, "b": [3]}, "name": "area"}\n</tool_call>'


def answer(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", **keys}


def calls_of(turn: dict[str, Any]) -> Any:
    return chat_of({"messages": [USER, turn, TOOL, ANSWER]}).messages[1].get("tool_calls")


@pytest.mark.parametrize(
    "turn",
    [
        answer(tool_calls=[AREA]),
        answer(tool_calls=[BARE]),
        answer(tool_calls=json.dumps([AREA])),
        answer(tool_calls=[json.dumps(AREA)]),
        answer(tool_calls=AREA),
        answer(tool_calls=[{"function": BARE}]),
        answer(tool_calls=[{"type": "function", "function": "area", "arguments": BARE["arguments"]}]),
        answer(tool_calls=[{"function": {"name": "area"}, "arguments": BARE["arguments"]}]),
        answer(tool_calls=[{"name": "area", "parameters": BARE["arguments"]}]),
        answer(tool_calls=[{"type": "tool_use", "name": "area", "input": BARE["arguments"]}]),
        answer(function_call=BARE),
        answer(function_call=json.dumps(BARE)),
        {"role": "function_call", "content": json.dumps(BARE)},
        {"from": "function_call", "value": json.dumps(BARE)},
        {"from": "Function Call", "value": BARE},
        {"from": "function_call", "value": json.dumps([BARE])},
        {"from": "tool_call", "value": HERMES},
        {"from": "gpt", "value": HERMES},
        {"from": "gpt", "value": HERMES.replace('"', "'")},
        answer(tool_calls=[{"name": "area", "arguments": json.dumps(BARE["arguments"])}]),
        answer(tool_calls=[{"name": "area", "arguments": json.dumps(json.dumps(BARE["arguments"]))}]),
    ],
)
def test_a_call_has_one_form(turn: dict[str, Any]) -> None:
    found = chat_of({"messages": [USER, turn, TOOL, ANSWER]})
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [AREA]}
    assert found.notes.unused == {}


def test_the_id_of_a_call_and_of_its_result_go_on() -> None:
    messages = chat_of(
        {
            "messages": [
                USER,
                answer(tool_calls=[{"id": "c1", **AREA}]),
                {**TOOL, "tool_call_id": "c1"},
                ANSWER,
            ]
        }
    ).messages
    assert (messages[1]["tool_calls"][0]["id"], messages[2]["tool_call_id"]) == ("c1", "c1")


@pytest.mark.parametrize("nothing", ["", " ", None, "null", "{}", {}, [], '""', '"{}"'])
def test_no_arguments_are_an_empty_object(nothing: Any) -> None:
    off = [{"type": "function", "function": {"name": "off", "arguments": {}}}]
    assert calls_of(answer(tool_calls=[{"function": {"name": "off", "arguments": nothing}}])) == off
    assert calls_of(answer(tool_calls=[{"function": {"name": "off"}}])) == off
    assert calls_of(answer(function_call={"name": "off", "arguments": nothing})) == off


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("{a: 1}", "turn 2: the arguments of `f` are not JSON: Expecting property name"),
        ('{"a": 1', "turn 2: the arguments of `f` are not JSON"),
        ("{'a': 1}", "turn 2: the arguments of `f` are not JSON"),
        ("a=1", "turn 2: the arguments of `f` are not JSON"),
        ("[1]", "turn 2: the arguments of `f` are a list, not an object: [1]"),
        (5, "turn 2: the arguments of `f` are a number, not an object"),
        ('{"a": NaN}', "turn 2: the arguments of `f` cannot be written as JSON"),
    ],
)
@pytest.mark.parametrize("form", ["tool_calls", "function_call", "turn"])
def test_arguments_that_are_no_object_are_a_bad_row(arguments: Any, reason: str, form: str) -> None:
    call = {"name": "f", "arguments": arguments}
    turn = {
        "tool_calls": answer(tool_calls=[{"function": call}]),
        "function_call": answer(function_call=call),
        "turn": {"role": "function_call", "content": json.dumps(call)},
    }[form]
    with pytest.raises(BadRowError, match=re.escape(reason)):
        calls_of(turn)


def test_a_call_turn_that_holds_no_call_is_a_bad_row() -> None:
    with pytest.raises(BadRowError, match="turn 2: the call is not JSON: 'area of 2 by 3'"):
        calls_of({"role": "function_call", "content": "area of 2 by 3"})
    with pytest.raises(BadRowError, match="turn 2: a tool call without a function name"):
        calls_of(answer(tool_calls=[{"function": {}}]))


def test_text_before_calls_stays_text() -> None:
    found = chat_of({"messages": [USER, answer(content=f"I compute.\n{HERMES}\n{HERMES}\n"), TOOL, ANSWER]})
    assert found.messages[1] == {"role": "assistant", "content": "I compute.", "tool_calls": [AREA, AREA]}


@pytest.mark.parametrize(
    "text",
    [
        f"Write {HERMES} to call it.",
        "Close it with </tool_call>",
        "Say <tool_call>...</tool_call>",
        "<tool_call></tool_call>",
    ],
)
def test_tags_that_somebody_explains_are_text(text: str) -> None:
    found = chat_of({"messages": [USER, answer(content=text)]})
    assert found.messages[1] == {"role": "assistant", "content": text}


def test_results_in_tags_are_results() -> None:
    two = {
        "role": "tool",
        "content": "<tool_response>\n1\n</tool_response>\n<tool_response>2</tool_response>",
    }
    found = turns_of({"messages": [USER, answer(content=f"{HERMES}\n{HERMES}"), two, ANSWER]})
    assert found[2:4] == [("tool", "1"), ("tool", "2")]
    odd = {"role": "tool", "content": "<tool_response>1</tool_response> and more"}
    assert turns_of({"messages": [USER, answer(content=HERMES), odd, ANSWER]})[2] == ("tool", odd["content"])


SCHEMA = {"name": "area", "description": "of a rectangle", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": SCHEMA}


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [WRAPPED]},
        {"tools": [SCHEMA]},
        {"tools": json.dumps([WRAPPED])},
        {"tools": json.dumps(SCHEMA)},
        {"tools": [json.dumps(WRAPPED)]},
        {"tools": SCHEMA},
        {"functions": [SCHEMA]},
        {"functions": json.dumps([SCHEMA])},
        {"tools": [], "functions": [SCHEMA]},
        {"tools": [{"name": "area", "description": "of a rectangle", "input_schema": {"type": "object"}}]},
    ],
)
def test_tools_have_one_form(columns: dict[str, Any]) -> None:
    for row in ({"messages": [USER, ANSWER]}, {"question": "q", "answer": "a"}):
        found = chat_of(row | columns)
        assert found.tools == [WRAPPED]
        assert found.notes.unused == {}


@pytest.mark.parametrize("nothing", [[], "", "[]", None, {}])
def test_no_tools(nothing: Any) -> None:
    assert chat_of({"messages": [USER, ANSWER], "tools": nothing}).tools is None


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("area", "`tools` is a text, not a list of JSON schemas"),
        (["area"], "`tools` entry 1 is a text, not a JSON schema: 'area'"),
        (5, "`tools` is a number, not a list"),
    ],
)
def test_tools_that_are_none(tools: Any, reason: str) -> None:
    with pytest.raises(BadRowError, match=re.escape(reason)):
        read({"messages": [USER, ANSWER], "tools": tools})


def test_tools_that_the_system_turn_lists_are_not_listed_twice() -> None:
    system = {"role": "system", "content": f"Call them. <tools> {json.dumps([WRAPPED])} </tools>"}
    found = chat_of({"messages": [system, USER, ANSWER], "tools": [WRAPPED]})
    assert found.tools is None
    assert TOOLS_LISTED in found.notes.counts
