from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mamba_sft.data.chats import Chat
from mamba_sft.data.formats import Passage, detect, detect_file, parse
from mamba_sft.data.values import BadRowError
from mamba_sft.errors import DataError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def chat(*messages: dict[str, Any], **columns: Any) -> Chat:
    found = parse({"messages": list(messages), **columns}, "messages")
    assert isinstance(found, Chat)
    return found


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER]}, "messages"),
        ({"messages": [], "text": "x"}, "messages"),
        ({"prompt": "p", "prompt_id": "1", "messages": [USER]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "sharegpt"),
        ({"conversations": [USER]}, "messages"),
        ({"conversations": [{"value": "q"}]}, "sharegpt"),
        ({"conversation": {"from": ["human"], "value": ["q"]}}, "sharegpt"),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca"),
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"text": "t"}, "text"),
        ({"instruction": "i", "response": "o"}, "prompt_completion"),
        ({"instruction": "i", "reply": "o"}, None),
        ({}, None),
    ],
)
def test_a_row_is_recognised_by_its_columns(row: dict[str, Any], expected: str | None) -> None:
    assert detect(row) == expected


def test_a_file_has_the_format_of_most_rows_and_says_what_was_seen() -> None:
    found, seen = detect_file(
        "a.jsonl", [{"text": "a"}, {"text": "b", "id": 1}, {"prompt": "p", "completion": "c"}]
    )
    assert found == "text"
    assert seen.startswith("looked at the first 3 rows of `a.jsonl`: columns `text`, `id`")
    assert seen.endswith("2 fit text (others look like prompt_completion)")


def test_rows_that_fit_nothing_say_what_was_looked_at() -> None:
    with pytest.raises(DataError) as error:
        detect_file("a.jsonl", [{"question": "q", "reply": "a"}] * 50)
    assert "looked at the first 50 rows of `a.jsonl`: columns `question`, `reply`" in error.value.message
    assert "`instruction` and `output`" in str(error.value.hint)


def test_openai_roles_and_content_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    found = chat({"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}, ANSWER)
    assert found.messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one \n\ntwo"},
        ANSWER,
    ]


def test_sharegpt_names_and_a_system_column() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    found = parse({"conversations": turns, "system": "s"}, "sharegpt")
    assert isinstance(found, Chat)
    assert found.messages == [SYSTEM, USER, ANSWER]
    as_columns = {"from": ["human", "gpt"], "value": ["q", "a"]}
    assert parse({"conversations": as_columns}, "sharegpt").messages == [USER, ANSWER]  # type: ignore[union-attr]
    as_json = json.dumps(turns)
    assert parse({"conversations": as_json}, "sharegpt").messages == [USER, ANSWER]  # type: ignore[union-attr]


def test_alpaca_joins_instruction_and_input() -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3", "system": "s"}
    found = parse(row, "alpaca")
    assert isinstance(found, Chat)
    assert [message["content"] for message in found.messages] == ["s", "add\n\n1 2", "3"]
    assert (
        parse({"instruction": "add", "input": None, "output": "3"}, "alpaca").messages[0]["content"] == "add"
    )  # type: ignore[union-attr]


def test_prompt_completion_as_texts_or_messages() -> None:
    pair = {"prompt": "p", "completion": " c"}
    assert parse(pair, "plain_completion") == Passage(" c", "p")
    as_turns = parse(pair, "prompt_completion")
    assert isinstance(as_turns, Chat)
    assert as_turns.messages == [{"role": "user", "content": "p"}, {"role": "assistant", "content": " c"}]
    found = parse({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, "prompt_completion")
    assert isinstance(found, Chat)
    assert (len(found.messages), found.context) == (4, {0})


def test_tools_and_calls_are_kept() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
    }
    for column in (tools, json.dumps(tools)):
        found = chat(
            USER,
            call,
            {"role": "tool", "content": ""},
            {"role": "tool", "content": "1"},
            ANSWER,
            tools=column,
        )
        assert found.tools == tools
        calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
        assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": calls}


def test_turns_after_the_last_answer_are_left_out_and_counted() -> None:
    found = chat(USER, ANSWER, USER, USER)
    assert found.messages == [USER, ANSWER]
    assert found.trimmed == 2


def test_an_empty_system_turn_counts_as_none_and_users_may_write_twice() -> None:
    assert chat({"role": "system", "content": " "}, USER, USER, ANSWER).messages == [USER, USER, ANSWER]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "usr", "content": "q"}, ANSWER], "turn 1: unknown role 'usr'; did you mean `user`?"),
        ([{"role": "narrator", "content": "q"}, ANSWER], "say who it is: `roles: {narrator: user}`"),
        ([{"content": "q"}, ANSWER], "turn 1 has no `role`; its keys are `content`"),
        ([{"role": "user", "content": "  "}, ANSWER], "turn 1 (user): empty content"),
        ([USER, {"role": "assistant", "content": None}], "turn 2 (assistant): empty content"),
        ([USER, {"role": "assistant", "content": 7}], "turn 2: content is a number, not text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ANSWER], "'image_url'; only text"),
        ([USER], "no assistant turn"),
        ([SYSTEM], "no assistant turn"),
        ([], "`messages` is empty"),
        ("hello", "`messages` is a text, not a list"),
        (["hello"], "turn 1 is a text"),
        ([ANSWER], "no turn asks for its only answer"),
        ([SYSTEM, ANSWER], "no turn asks for its only answer"),
        ([USER, ANSWER, ANSWER], "turn 3: an assistant turn that follows another"),
        ([USER, {"role": "tool", "content": "1"}, ANSWER], "a tool turn must follow"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}],
            "a tool call without a function name",
        ),
        ([USER, {"role": "assistant", "content": "half \ud83d"}], "\\ud83d is half a character"),
    ],
)
def test_bad_chats_say_which_turn_and_why(messages: Any, reason: str) -> None:
    with pytest.raises(BadRowError, match=re.escape(reason)):
        parse({"messages": messages}, "messages")


@pytest.mark.parametrize(
    ("row", "expected", "reason"),
    [
        ({"text": "t"}, "messages", "not messages: it looks like text"),
        ({"q": 1}, "alpaca", "its columns are `q`; alpaca needs `instruction` and `output`"),
        ({"text": ""}, "text", "`text` is empty"),
        ({"text": 5}, "text", "`text` is a number, not text"),
        ({"prompt": "p", "completion": " "}, "prompt_completion", "`completion` is empty"),
        ({"prompt": "p", "completion": [ANSWER]}, "plain_completion", "both must be texts"),
        ({"prompt": 7, "completion": "c"}, "prompt_completion", "`prompt` is a number, not text"),
        ({"prompt": [USER], "completion": [USER]}, "prompt_completion", "`completion` has no assistant turn"),
        ({"instruction": "i", "output": ""}, "alpaca", "`output` is empty"),
        ({"messages": [USER, ANSWER], "tools": "none"}, "messages", "`tools` is a text"),
    ],
)
def test_bad_rows_say_why(row: dict[str, Any], expected: str, reason: str) -> None:
    with pytest.raises(BadRowError, match=re.escape(reason)):
        parse(row, expected)


def test_a_row_with_more_columns_than_its_format_is_fine() -> None:
    assert parse({"text": "t", "messages": [USER, ANSWER]}, "text") == Passage("t")
