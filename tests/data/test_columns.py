from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mamba_sft.data.formats import Passage, detect, detect_file
from mamba_sft.data.values import BadRowError
from mamba_sft.errors import DataError
from tests.data.reading import ANSWER, USER, chat_of, read, reading, turns_of

PAIR = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a"},
        {"prompt": "q", "response": "a"},
        {"input": "q", "output": "a"},
        {"instruction": "q", "response": "a"},
        {"Question": "q", "Answer": "a", "id": 1},
        {"Context": "q", "Response": "a"},
        {"problem": "q", "solution": "a"},
        {"human": "q", "assistant": "a"},
        {"user": "q", "bot": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        {"prompt": json.dumps([USER]), "completion": "a"},
        {"prompt": "q", "completion": [ANSWER]},
        {"prompt": USER, "completion": ANSWER},
        *({name: [USER, ANSWER]} for name in ("conversation", "chat", "dialog", "dialogue", "turns")),
        {"chat": json.dumps([USER, ANSWER])},
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"conversation": [{"assistant": "a", "human": "q"}]},
        {"conversations": [{"user": "q"}, {"assistant": "a"}]},
        {"messages": [{"question": "q", "answer": "a"}]},
        {"conversation": [["q", "a"]]},
        {"messages": [json.dumps(USER), json.dumps(ANSWER)]},
        {"messages": [{"from": "user", "content": "q"}, {"role": "assistant", "value": "a"}]},
    ],
)
def test_layouts_known_without_asking(row: dict[str, Any]) -> None:
    found = chat_of(row)
    assert [(message["role"], message["content"]) for message in found.messages] == PAIR
    assert found.notes.unused == {}


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "q", "context": "c", "response": "a"}, "q\n\nc"),
        ({"instruction": "q", "context": "", "response": "a"}, "q"),
        ({"instruction": "q", "input": "c", "output": "a"}, "q\n\nc"),
        ({"instruction": "q", "input": float("nan"), "output": "a"}, "q"),
        ({"question": "q", "context": "c", "answer": "a"}, "q\n\nc"),
    ],
)
def test_what_goes_with_a_question(row: dict[str, Any], asked: str) -> None:
    assert turns_of(row) == [("user", asked), ("assistant", "a")]


@pytest.mark.parametrize("column", ["system", "system_prompt", "System"])
def test_a_system_column(column: str) -> None:
    for row in ({"question": "q", "response": "a"}, {"messages": [USER, ANSWER]}):
        assert turns_of(row | {column: "s"}) == [("system", "s"), *PAIR]
        assert turns_of(row | {column: " "}) == PAIR
        assert turns_of(row | {column: None}) == PAIR


@pytest.mark.parametrize(
    "history",
    [
        [["one", "two"]],
        '[["one", "two"]]',
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}],
        [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}],
        [{"question": "one", "answer": "two"}],
        ['["one", "two"]'],
    ],
)
def test_history_is_earlier_turns(history: Any) -> None:
    before = [("user", "one"), ("assistant", "two")]
    assert turns_of({"instruction": "q", "input": "", "output": "a", "history": history}) == [*before, *PAIR]
    assert turns_of({"messages": [USER, ANSWER], "history": history}) == [*before, *PAIR]
    assert turns_of({"query": "q", "response": "a", "system": "s", "history": history})[:2] == [
        ("system", "s"),
        before[0],
    ]
    assert chat_of({"instruction": "q", "output": "a", "history": history}).context == set()


@pytest.mark.parametrize("history", [[], None, "", "[]"])
def test_no_history(history: Any) -> None:
    assert turns_of({"instruction": "q", "output": "a", "history": history}) == PAIR


def test_history_that_is_none_is_refused() -> None:
    with pytest.raises(BadRowError, match="`history` is a text, not a list"):
        read({"instruction": "q", "output": "a", "history": "we talked"})


def test_columns_of_the_recipe() -> None:
    row = {"ask": "q", "reply": "a", "who": "s", "past": [["one", "two"]], "prompt": "other", "more": "m"}
    columns = {"prompt": "ask", "response": "reply", "system": "who", "history": "past", "input": "more"}
    found = chat_of(row, columns=columns)
    assert [message["content"] for message in found.messages] == ["s", "one", "two", "q\n\nm", "a"]
    assert found.notes.unused == {"row": {"prompt": 1}}
    assert turns_of({"talk": [USER, ANSWER]}, columns={"messages": "talk"}) == PAIR
    assert read({"body": "t", "messages": [USER, ANSWER]}, columns={"text": "body"}) == Passage("t")
    schema = {"name": "f", "parameters": {}}
    tools = chat_of({"messages": [USER, ANSWER], "api": [schema]}, columns={"tools": "api"}).tools
    assert tools == [{"type": "function", "function": schema}]


def test_half_a_mapping_leaves_the_other_half_to_its_name() -> None:
    assert turns_of({"ask": "q", "response": "a"}, columns={"prompt": "ask"}) == PAIR
    assert turns_of({"question": "q", "reply": "a"}, columns={"response": "reply"}) == PAIR


def test_columns_that_are_not_there() -> None:
    how = reading(columns={"prompt": "ask", "response": "reply"})
    with pytest.raises(DataError, match="`columns` names `ask`, `reply`, which are not among them"):
        detect_file("a.jsonl", [{"question": "q", "answer": "a"}], how)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"question": "q", "reply": "a"}, "columns: {prompt: question, response: reply}"),
        ({"ask": "q", "answer": "a longer one"}, "columns: {prompt: ask, response: answer}"),
        ({"title": "q", "body": "a"}, "columns: {prompt: title, response: body}"),
        (
            {"id": "7", "dialogue": "a longer one", "summary": "a"},
            "columns: {prompt: dialogue, response: summary}",
        ),
    ],
)
def test_the_hint_names_the_likeliest_pair(row: dict[str, Any], line: str) -> None:
    with pytest.raises(DataError) as error:
        detect_file("a.jsonl", [row])
    assert f"`{line}`" in str(error.value.hint)


def test_two_answers_are_not_guessed_between() -> None:
    row = {"question": "q", "answer": "a", "response": "b"}
    assert detect(row) is None
    with pytest.raises(DataError, match="which of `response`, `answer` to train on is not clear"):
        detect_file("a.jsonl", [row])
    assert turns_of(row, columns={"response": "answer"}) == PAIR


def test_a_pair_with_a_name_holds_whatever_else_is_there() -> None:
    assert detect({"instruction": "i", "input": "", "output": "o", "prompt": "p", "text": "t"}) == "alpaca"
    assert detect({"prompt": "p", "completion": "c", "answer": "42"}) == "prompt_completion"


def test_a_number_of_turns_is_no_conversation() -> None:
    assert turns_of({"turns": 2, "question": "q", "answer": "a"}) == PAIR


def test_what_was_taken_for_what_is_said() -> None:
    _, seen = detect_file("a.jsonl", [{"instruction": "q", "context": "c", "response": "a"}])
    assert seen.endswith("(`instruction` and `context` as the prompt, `response` as the answer)")
    _, seen = detect_file("a.jsonl", [{"instruction": "q", "input": "c", "output": "a"}])
    assert seen.endswith("1 fit alpaca")


def test_json_that_is_no_list_of_messages_stays_text() -> None:
    listed, objects = "[1, 2, 3]", '[{"a": 1}]'
    assert turns_of({"prompt": listed, "completion": objects}) == [("user", listed), ("assistant", objects)]


def test_a_list_as_python_prints_it_is_explained() -> None:
    for row in (
        {"messages": str([USER, ANSWER])},
        {"prompt": str([USER]), "completion": "a"},
        {"messages": "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"},
    ):
        with pytest.raises(BadRowError, match=re.escape("orient='records', lines=True")):
            read(row)
    assert turns_of({"prompt": "[{'a': 1}]", "completion": "a"})[0] == ("user", "[{'a': 1}]")


def test_json_nested_too_deeply_is_a_bad_row() -> None:
    deep = "[" * 20_000
    for row in (
        {"messages": [USER, ANSWER], "tools": deep},
        {"messages": deep},
        {"messages": [USER, ANSWER], "history": deep},
    ):
        with pytest.raises(BadRowError, match="nested"):
            read(row)


def test_nan_where_text_must_be() -> None:
    with pytest.raises(BadRowError, match="`output` is NaN, not text"):
        read({"instruction": "q", "output": float("nan")})
