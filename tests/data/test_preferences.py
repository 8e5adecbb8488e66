from __future__ import annotations

from typing import Any

import pytest

from mamba_sft.data.chats import LeftOut
from mamba_sft.data.formats import refuse_preference_file
from mamba_sft.data.notes import NOT_CHOSEN
from mamba_sft.data.values import BadRowError
from mamba_sft.errors import DataError
from tests.data.reading import ANSWER, USER, chat_of, read, reading, turns_of

GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
CHOSEN = [("user", "q"), ("assistant", "good")]
PREFERENCES: list[dict[str, Any]] = [
    {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    {
        "conversations": [USER],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    {"messages": [USER], "chosen": "good", "rejected": "bad"},
    {"prompt": "q", "chosen": "good", "rejected": "bad"},
    {"question": "q", "chosen": "good", "rejected": "bad"},
    {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"messages": [USER, GOOD], "chosen": "good", "rejected": "bad"},
    {"messages": [USER, GOOD], "rejected": "bad"},
    {"messages": [USER, GOOD], "rejected_response": "bad"},
    {"prompt": "q", "response": "good", "rejected": "bad"},
]


@pytest.mark.parametrize("row", PREFERENCES)
def test_preference_data_are_refused_until_the_recipe_says_which_answer(row: dict[str, Any]) -> None:
    with pytest.raises(BadRowError, match=r"preference data.*set `preference: chosen` on the source"):
        read(row)
    with pytest.raises(DataError, match=r"`a\.jsonl` is preference data: 2 of the 2 rows") as error:
        refuse_preference_file("a.jsonl", [row, row], reading())
    assert "`preference: chosen` under `data.sources`" in str(error.value.hint)


@pytest.mark.parametrize("row", PREFERENCES)
def test_the_chosen_answer_is_trained(row: dict[str, Any]) -> None:
    found = chat_of(row, preference="chosen")
    assert [(message["role"], message["content"]) for message in found.messages] == CHOSEN
    assert (found.context, found.notes.unused) == (set(), {})
    refuse_preference_file("a.jsonl", [row], reading(preference="chosen"))


def test_answers_before_the_chosen_one_are_context() -> None:
    found = chat_of(
        {"messages": [USER, ANSWER, USER], "chosen": "good", "rejected": "bad"}, preference="chosen"
    )
    assert (len(found.messages), found.context) == (4, {0})


@pytest.mark.parametrize("no", [False, 0, "false", "0"])
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_labels(no: Any, key: str) -> None:
    row = {"messages": [USER, ANSWER]}
    for value in (no, True):
        with pytest.raises(BadRowError, match=f"`{key}`: preference data"):
            read(row | {key: value})
    left = read(row | {key: no}, preference="chosen")
    assert isinstance(left, LeftOut)
    assert left.notes.counts == {NOT_CHOSEN: 1}
    assert chat_of(row | {key: True}, preference="chosen").notes.unused == {}


@pytest.mark.parametrize("value", ["positive", 3])
def test_labels_that_are_categories_are_named(value: Any) -> None:
    assert chat_of({"messages": [USER, ANSWER], "label": value}).notes.unused == {"row": {"label": 1}}
    assert read({"text": "t", "label": True}).notes.unused == {"row": {"label": 1}}


def test_nothing_chosen_or_rejected_is_no_preference() -> None:
    row = {"messages": [USER, ANSWER], "chosen": None, "rejected": "", "label": None}
    assert turns_of(row) == [("user", "q"), ("assistant", "a")]


def test_a_few_such_rows_are_bad_rows_and_not_a_bad_file() -> None:
    refuse_preference_file("a.jsonl", [PREFERENCES[0], *[{"messages": [USER, ANSWER]}] * 2], reading())


def test_names_of_the_recipe() -> None:
    row = {"prompt": "q", "better": "good", "worse": "bad"}
    columns = {"chosen": "better", "rejected": "worse"}
    assert turns_of(row, columns=columns, preference="chosen") == CHOSEN
