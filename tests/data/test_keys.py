from __future__ import annotations

import re
from typing import Any

import pytest

from mamba_sft.data.chats import Chat, LeftOut
from mamba_sft.data.keys import switch
from mamba_sft.data.notes import CONTEXT, WEIGHT_ZERO
from mamba_sft.data.values import BadRowError
from tests.data.reading import ANSWER, SYSTEM, USER, chat_of, read, turns_of

FLAGS = ["weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale"]
OFF = [0, 0.0, False, "0", "0.0", "false", " False ", "no"]
ON = [1, 1.0, True, "1", "true", None, "", float("nan")]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
TOOL = {"role": "tool", "content": "1"}


def two_answers(**flags: Any) -> dict[str, Any]:
    return {"messages": [USER, {**ANSWER, "content": "wrong", **flags}, USER, ANSWER]}


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("value", OFF)
def test_an_answer_of_weight_0_is_context(key: str, value: Any) -> None:
    found = chat_of(two_answers(**{key: value}))
    assert (found.context, found.masked) == ({0}, {0})
    assert len(found.messages) == 4
    assert CONTEXT in found.notes.counts


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("value", ON)
def test_an_answer_of_weight_1_or_none_is_trained(key: str, value: Any) -> None:
    found = chat_of(two_answers(**{key: value}))
    assert (found.context, found.masked, found.notes.unused) == (set(), set(), {})


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("value", [0.5, 2, -1, "often", [0], {"a": 1}])
def test_an_answer_of_another_weight_is_refused(key: str, value: Any) -> None:
    with pytest.raises(BadRowError, match=re.escape(f"turn 2: `{key}` is ")):
        read(two_answers(**{key: value}))


@pytest.mark.parametrize("key", ["mask", "loss_mask", "train_detail"])
def test_flags_that_may_mean_either_are_refused(key: str) -> None:
    with pytest.raises(BadRowError, match=f"turn 2: `{key}` may mean either way"):
        read(two_answers(**{key: [1]}))


def test_one_flag_that_says_no_is_enough() -> None:
    assert chat_of(two_answers(weight=1, train=False)).masked == {0}


def test_weight_0_everywhere_leaves_the_row_out() -> None:
    found = read({"messages": [USER, {**ANSWER, "weight": 0}]})
    assert isinstance(found, LeftOut)
    assert WEIGHT_ZERO in found.notes.counts


def test_weight_0_on_other_turns_is_remembered_for_runs_that_train_all() -> None:
    weightless: dict[str, Any] = {"weight": 0}
    found = chat_of({"messages": [USER, CALL, TOOL | weightless, ANSWER]})
    assert (found.masked, found.masked_others) == (set(), 3)
    assert chat_of({"messages": [SYSTEM | weightless, USER, ANSWER]}).masked_others == 1
    assert chat_of({"messages": [{**USER, "weight": 1}, ANSWER]}).masked_others is None


@pytest.mark.parametrize("key", ["weight", "loss_weight", "sample_weight", "train", "trainable", "loss"])
@pytest.mark.parametrize("value", OFF)
@pytest.mark.parametrize(
    "row", [{"messages": [USER, ANSWER]}, {"text": "t"}, {"prompt": "p", "completion": "c"}]
)
def test_a_row_of_weight_0_is_left_out(key: str, value: Any, row: dict[str, Any]) -> None:
    found = read(row | {key: value})
    assert isinstance(found, LeftOut)
    assert found.notes.counts == {WEIGHT_ZERO: 1}


@pytest.mark.parametrize("value", [0.5, 2, "heavy", -1])
def test_rows_cannot_be_weighed(value: Any) -> None:
    with pytest.raises(BadRowError, match=r"`weight` is .*a row has 0 \(left out\) or 1"):
        read({"messages": [USER, ANSWER], "weight": value})


@pytest.mark.parametrize("value", ON)
def test_a_row_of_weight_1_is_a_row(value: Any) -> None:
    assert chat_of({"messages": [USER, ANSWER], "weight": value}).notes.unused == {}


def test_a_measured_loss_of_a_row_is_named_and_no_flag() -> None:
    assert chat_of({"messages": [USER, ANSWER], "loss": 2.31}).notes.unused == {"row": {"loss": 1}}


@pytest.mark.parametrize("key", ["images", "image", "videos", "video", "audios", "audio", "Images"])
@pytest.mark.parametrize("value", [["a.png"], "a.png", '["a.png"]', {"bytes": "x"}])
def test_media_with_entries_are_refused(key: str, value: Any) -> None:
    for row in ({"messages": [USER, ANSWER]}, {"instruction": "i", "output": "o"}, {"text": "t"}):
        with pytest.raises(BadRowError, match=f"`{key}` has entries; only text can be trained on"):
            read(row | {key: value})
    with pytest.raises(BadRowError, match=f"turn 1: `{key}` has entries"):
        read({"messages": [{**USER, key: value}, ANSWER]})


@pytest.mark.parametrize("value", [[], None, "", "[]", {}, float("nan")])
def test_media_without_entries_say_nothing(value: Any) -> None:
    found = chat_of({"messages": [{**USER, "images": value}, ANSWER], "images": value, "audios": value})
    assert found.notes.unused == {}


def test_unknown_keys_are_named_once_at_each_level() -> None:
    calls = [{"function": {"name": "f", "arguments": {}, "strict": True}, "speed": "high", "id": "c"}]
    moody = {**CALL, "tool_calls": calls, "mood": "bad"}
    found = chat_of(
        {
            "messages": [
                {**USER, "mood": "sad"},
                moody,
                TOOL,
                {**ANSWER, "mood": "good"},
            ],
            "score": 3,
            "id": 7,
            "Source": "web",
            "empty": None,
            "blank": " ",
            "none": [],
        }
    )
    assert found.notes.unused == {
        "row": {"score": 1},
        "turn": {"mood": 1},
        "tool call": {"strict": 1, "speed": 1},
    }
    (sentence,) = found.notes.sentences()
    assert sentence.startswith("columns not used: `score`; of turns `mood`; of tool calls `")
    assert "`strict`" in sentence


def test_columns_that_another_format_reads_are_named_too() -> None:
    assert read({"text": "t", "system": "s"}).notes.unused == {"row": {"system": 1}}
    assert chat_of({"messages": [USER, ANSWER], "text": "t"}).notes.unused == {"row": {"text": 1}}


def test_a_prompt_that_repeats_the_first_question_is_no_news() -> None:
    assert chat_of({"messages": [USER, ANSWER], "prompt": "q", "prompt_id": "1"}).notes.unused == {}
    assert chat_of({"messages": [USER, ANSWER], "prompt": "p"}).notes.unused == {"row": {"prompt": 1}}


def test_an_answer_under_refusal_is_the_answer() -> None:
    refused = {"role": "assistant", "content": None, "refusal": "I will not."}
    assert turns_of({"messages": [USER, refused]})[-1] == ("assistant", "I will not.")
    assert chat_of({"messages": [USER, {**ANSWER, "refusal": None}]}).notes.unused == {}
    with pytest.raises(BadRowError, match="both `content` and `refusal`"):
        read({"messages": [USER, {**ANSWER, "refusal": "no"}]})


def test_names_go_to_templates_that_have_them() -> None:
    named = {"messages": [{**USER, "name": "Ada"}, ANSWER]}
    assert chat_of(named).notes.unused == {"turn": {"name": 1}}
    assert "name" not in chat_of(named).messages[0]
    kept = chat_of(named, names=True)
    assert (kept.notes.unused, kept.messages[0]["name"]) == ({}, "Ada")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, True), (0.0, False), ("FALSE", False), (2, None), ("on it", None), ([], None)],
)
def test_switches(value: Any, expected: bool | None) -> None:
    assert switch(value) is expected


def test_reading_a_row_does_not_change_it() -> None:
    row = two_answers(weight=0, reasoning_content="hm")
    before = repr(row)
    assert isinstance(read(row), Chat)
    assert repr(row) == before
