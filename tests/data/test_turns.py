from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mamba_sft.data.notes import (
    ASSISTANT_FIRST,
    REASONING_DROPPED,
    REASONING_KEPT,
    SYSTEM_JOINED,
    SYSTEM_LATER,
)
from mamba_sft.data.values import BadRowError
from tests.data.reading import ANSWER, SYSTEM, USER, chat_of, read, turns_of

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
TOOL = {"role": "tool", "content": "1"}


@pytest.mark.parametrize("name", ["user", "USER", " Human ", "human", "prompter", "Prompter"])
def test_names_of_the_user(name: str) -> None:
    assert turns_of({"messages": [{"role": name, "content": "q"}, ANSWER]})[0] == ("user", "q")
    assert turns_of({"conversations": [{"from": name, "value": "q"}, ANSWER]})[0] == ("user", "q")


@pytest.mark.parametrize(
    "name", ["assistant", "ASSISTANT", "gpt", "GPT ", "AI", "ai", "bot", "model", "chatgpt"]
)
def test_names_of_the_assistant(name: str) -> None:
    assert turns_of({"messages": [USER, {"role": name, "content": "a"}]})[1] == ("assistant", "a")


@pytest.mark.parametrize("name", ["tool", "function", "observation", "ipython", "IPython", "tool_response"])
def test_names_of_tools(name: str) -> None:
    found = turns_of({"messages": [USER, CALL, {"role": name, "content": "1"}, ANSWER]})
    assert found[2] == ("tool", "1")


def test_developers_and_systems() -> None:
    assert turns_of({"messages": [{"role": "Developer", "content": "s"}, USER, ANSWER]})[0] == ("system", "s")


def test_roles_of_the_recipe() -> None:
    row = {"messages": [{"role": " Customer", "content": "q"}, {"role": "AGENT", "content": "a"}]}
    with pytest.raises(BadRowError, match=re.escape("unknown role ' Customer'; say who it is")):
        read(row)
    mapped = {"customer": "user", "Agent ": "assistant"}
    assert turns_of(row, roles=mapped) == [("user", "q"), ("assistant", "a")]
    model = {"messages": [{"role": "model", "content": "q"}, ANSWER]}
    assert turns_of(model, roles={"model": "user"})[0] == ("user", "q")


def test_a_name_that_is_nearly_known_is_suggested_and_others_are_not() -> None:
    with pytest.raises(BadRowError, match="did you mean `assistant`"):
        read({"messages": [USER, {"role": "asistant", "content": "a"}]})
    with pytest.raises(BadRowError) as error:
        read({"messages": [{"role": "instruction", "content": "q"}, ANSWER]})
    assert "function" not in str(error.value)
    assert "`roles: {instruction: user}`" in str(error.value)


def test_a_chat_that_the_assistant_begins_keeps_that_turn_as_context() -> None:
    hello = {"role": "assistant", "content": "Welcome!"}
    found = chat_of({"messages": [hello, USER, ANSWER]})
    assert (len(found.messages), found.context, found.masked) == (3, {0}, set())
    assert ASSISTANT_FIRST in found.notes.counts
    assert chat_of({"messages": [SYSTEM, hello, USER, ANSWER, USER, ANSWER]}).context == {0}
    with pytest.raises(BadRowError, match="turn 2: an assistant turn that follows another"):
        read({"messages": [hello, hello, USER, ANSWER]})


def test_leading_system_turns_are_joined() -> None:
    second = {"role": "developer", "content": "t"}
    found = chat_of({"messages": [SYSTEM, second, USER, ANSWER]})
    assert found.messages[0] == {"role": "system", "content": "s\n\nt"}
    assert SYSTEM_JOINED in found.notes.counts
    beside = chat_of({"messages": [second, USER, ANSWER], "system": "s"})
    assert beside.messages == found.messages


def test_a_system_text_that_is_said_twice_counts_once() -> None:
    found = chat_of({"messages": [SYSTEM, USER, ANSWER], "system": "s"})
    assert found.messages[0] == SYSTEM
    assert not found.notes.sentences()


def test_a_later_system_turn_stays_where_it_is() -> None:
    found = chat_of({"messages": [USER, ANSWER, SYSTEM, USER, ANSWER]})
    assert found.messages[2] == SYSTEM
    assert SYSTEM_LATER in found.notes.counts
    assert len(chat_of({"messages": [USER, ANSWER, {**SYSTEM, "content": " "}, USER, ANSWER]}).messages) == 4


def test_a_call_without_its_result_is_named() -> None:
    with pytest.raises(BadRowError, match="turn 3: the call in turn 2 has no tool turn"):
        read({"messages": [USER, CALL, ANSWER]})
    with pytest.raises(BadRowError, match="turn 3: an assistant turn that follows another"):
        read({"messages": [USER, ANSWER, ANSWER]})


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_kept_or_dropped(key: str) -> None:
    row = {"messages": [USER, {**ANSWER, key: "because"}]}
    kept = chat_of(row)
    assert kept.messages[1] == {**ANSWER, "reasoning_content": "because"}
    assert REASONING_KEPT in kept.notes.counts
    dropped = chat_of(row, reasoning="drop")
    assert dropped.messages[1] == ANSWER
    assert REASONING_DROPPED in dropped.notes.counts
    assert (kept.notes.unused, dropped.notes.unused) == ({}, {})


def test_reasoning_alone_is_an_answer_unless_it_is_dropped() -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "", "thinking": "because"}]}
    assert chat_of(row).messages[1]["reasoning_content"] == "because"
    with pytest.raises(BadRowError, match=re.escape("turn 2 (assistant): empty content")):
        read(row, reasoning="drop")


def test_reasoning_in_the_text_is_dropped_too() -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "<think>\nbecause\n</think>\n\na"}]}
    assert chat_of(row).messages[1]["content"] == "<think>\nbecause\n</think>\n\na"
    dropped = chat_of(row, reasoning="drop")
    assert dropped.messages[1] == ANSWER
    assert REASONING_DROPPED in dropped.notes.counts


def test_reasoning_beside_a_pair() -> None:
    found = chat_of({"question": "q", "answer": "a", "thinking": "because"})
    assert found.messages[1]["reasoning_content"] == "because"
    assert found.notes.unused == {}


@pytest.mark.parametrize("value", ["on", "off", True, None, ""])
def test_a_word_about_reasoning_is_none(value: Any) -> None:
    found = chat_of({"question": "q", "answer": "a", "reasoning": value})
    assert "reasoning_content" not in found.messages[1]
    assert ("reasoning" in found.notes.unused.get("row", {})) == bool(value)


def test_what_only_an_answer_has_is_named_on_other_turns() -> None:
    found = chat_of({"messages": [{**USER, "thinking": "hm", "refusal": "no", "tool_calls": [1]}, ANSWER]})
    assert found.notes.unused == {"turn": {"thinking": 1, "refusal": 1, "tool_calls": 1}}


def test_reasoning_that_is_no_text_is_refused() -> None:
    with pytest.raises(BadRowError, match="turn 2: `thinking` is a list, not text"):
        read({"messages": [USER, {**ANSWER, "thinking": ["one"]}]})


@pytest.mark.parametrize(
    "parts",
    [
        ["one", "two"],
        [{"type": "text", "text": "one"}, {"type": "text", "value": "two"}],
        [{"text": "one"}, {"type": "input_text", "text": "two"}],
        [{"type": "text", "text": "one", "image_url": None}, "", "two"],
    ],
)
def test_parts_are_joined_by_a_blank_line(parts: list[Any]) -> None:
    assert turns_of({"messages": [{"role": "user", "content": parts}, ANSWER]})[0] == ("user", "one\n\ntwo")


def test_thinking_among_the_parts_is_reasoning() -> None:
    parts = [{"type": "thinking", "thinking": "because"}, {"type": "text", "text": "a"}]
    found = chat_of({"messages": [USER, {"role": "assistant", "content": parts}]})
    assert found.messages[1] == {**ANSWER, "reasoning_content": "because"}


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "a content part is 'image_url'; only text"),
        ({"type": "tool_use", "name": "f"}, "a content part is 'tool_use'; only text"),
        ({"type": "text", "foo": "x"}, "a text part has no `text`; its keys are type, foo"),
        (7, "a content part is a number; only text"),
    ],
)
def test_other_parts_are_refused(part: Any, reason: str) -> None:
    with pytest.raises(BadRowError, match=re.escape(f"turn 1: {reason}")):
        read({"messages": [{"role": "user", "content": ["x", part]}, ANSWER]})


def test_a_turn_without_a_role_says_its_keys() -> None:
    with pytest.raises(BadRowError, match=re.escape("turn 1 has no `role`; its keys are `who`, `what`")):
        read({"messages": [{"who": "me", "what": "hi"}, ANSWER]})
    with pytest.raises(BadRowError, match="turn 2 is a text, not an object with `role` and `content`"):
        read({"messages": [USER, "a"]})


def test_turns_as_arrow_has_them() -> None:
    columns = {"role": ["user", "assistant"], "content": ["q", "a"]}
    assert turns_of({"messages": columns}) == turns_of({"messages": json.dumps([USER, ANSWER])})


def test_context_is_counted_in_the_turns_that_are_left() -> None:
    empty, second = {"role": "system", "content": " "}, {"role": "system", "content": "t"}
    prompt = [SYSTEM, second, empty, USER, ANSWER, USER]
    found = chat_of({"prompt": prompt, "completion": [ANSWER]})
    assert (len(found.messages), found.context) == (5, {0})
