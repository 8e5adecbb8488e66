"""What rows mean, seen in their tokens: what is rendered and trained, and what the summary says of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.errors import DataError
from mamba_sft.model.chat_template import TemplateSetup, prepare_tokenizer
from mamba_sft.recipe.fields import ChatSection
from tests.data.test_preparing import chat, prepare, texts, trained, write


@pytest.fixture
def setup(tiny_tokenizer: Any) -> TemplateSetup:
    return prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11})


def test_prompts_and_completions_are_turns_of_the_template(setup: TemplateSetup, tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "hello", "completion": "world"}])
    chats = write(tmp_path / "chats.jsonl", [chat("hello", "world")])
    assert texts(setup, prepare(setup, pairs)) == texts(setup, prepare(setup, chats))
    assert trained(setup, prepare(setup, pairs).train[0]) == "world<|im_end|>"


def test_messages_in_cells_are_messages(setup: TemplateSetup, tmp_path: Path) -> None:
    question, answer = (json.dumps([message]) for message in chat("hello", "world")["messages"])
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), (question, answer)])
    assert texts(setup, prepare(setup, path)) == [
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>"
    ]


def test_plain_rows_alone_do_not_fit_chat_and_the_summary_says_so(
    setup: TemplateSetup, tmp_path: Path
) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "hello", "completion": "world"}])
    chats = write(tmp_path / "chats.jsonl", [chat("hello", "world")])
    plain = prepare(setup, pairs, formats=("plain_completion",)).summary
    assert plain.fits_no_chat
    assert plain.warnings()[0].startswith("no row goes through the chat template")
    assert plain.to_dict()["fits_no_chat"] is True
    for summary in (
        prepare(setup, pairs).summary,
        prepare(setup, pairs, chats, formats=("plain_completion", "auto")).summary,
    ):
        assert not summary.fits_no_chat
        assert not any("chat template" in warning for warning in summary.warnings())


def weighed(weight: Any) -> dict[str, Any]:
    turns = [*chat("one", "wrong")["messages"], *chat("sure", "right")["messages"]]
    turns[1]["weight"] = weight
    return {"messages": turns}


def test_answers_of_weight_0_are_not_trained(setup: TemplateSetup, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [weighed(0), weighed(1)])
    prepared = prepare(setup, path)
    assert [trained(setup, row) for row in prepared.train] == [
        "right<|im_end|>",
        "wrong<|im_end|>right<|im_end|>",
    ]
    assert len(set(texts(setup, prepared))) == 1
    assert "answers with weight 0 are context, not trained, in 1 row" in prepared.summary.warnings()
    all_tokens = prepare(setup, path, assistant_only_loss=False)
    assert "wrong" not in trained(setup, all_tokens.train[0])
    assert "one" in trained(setup, all_tokens.train[0])


def test_a_weight_that_no_mask_can_honour_is_a_bad_row(setup: TemplateSetup, tmp_path: Path) -> None:
    row = chat("one", "two")
    row["messages"][0]["weight"] = 0
    path = write(tmp_path / "a.jsonl", [row])
    assert trained(setup, prepare(setup, path).train[0]) == "two<|im_end|>"
    with pytest.raises(DataError, match="turn 1: weight 0 on a turn that is not the assistant's"):
        prepare(setup, path, assistant_only_loss=False)


def test_rows_of_weight_0_are_left_out_and_counted(setup: TemplateSetup, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("one", "two"), chat("three", "four") | {"weight": 0}])
    summary = prepare(setup, path).summary
    assert (summary.read, summary.bad, summary.sources[0].kept) == (2, 0, 1)
    assert "left out for a weight of 0: 1 row" in summary.warnings()
    with pytest.raises(DataError, match="no row is left to train on: 1 read, 1 left out for a weight of 0"):
        prepare(setup, write(tmp_path / "b.jsonl", [chat("one", "two") | {"weight": 0}]))


def test_what_was_done_with_rows_adds_up_over_sources(setup: TemplateSetup, tmp_path: Path) -> None:
    hello = {"role": "assistant", "content": "hello"}
    first = write(tmp_path / "a.jsonl", [{"messages": [hello, *chat("q", "a")["messages"]]}] * 2)
    odd = {"messages": [hello, *chat("q", "b")["messages"]], "mood": 1}
    second = write(tmp_path / "b.jsonl", [odd, odd | {"topics": "x"}])
    summary = prepare(setup, first, second).summary
    assert "the assistant begins in 4 rows: that turn is context, not trained" in summary.warnings()
    assert "columns not used: `mood`, `topics`" in summary.warnings()
    as_json = json.loads(json.dumps(summary.to_dict()))
    assert as_json["notes"]["unused"] == {"row": {"mood": 2, "topics": 1}}
    assert as_json["sources"][1]["notes"]["counts"]["assistant first"] == 2


def test_preference_data_are_one_message_a_file(setup: TemplateSetup, tmp_path: Path) -> None:
    rows = [chat("q", f"a {i}") | {"label": i % 2 == 0} for i in range(4)]
    path = write(tmp_path / "a.jsonl", rows)
    for on_bad_row in ("stop", "skip"):
        with pytest.raises(
            DataError, match=r"a\.jsonl` is preference data: 4 of the 4 rows looked at have `label`"
        ):
            prepare(setup, path, on_bad_row=on_bad_row)
    prepared = prepare(setup, path, source={"preference": "chosen"})
    assert [trained(setup, row) for row in prepared.train] == ["a 0<|im_end|>", "a 2<|im_end|>"]
    assert "left out because the answer was rejected: 2 rows" in prepared.summary.warnings()


def test_a_column_of_the_recipe_that_no_row_has_is_named(setup: TemplateSetup, tmp_path: Path) -> None:
    rows = [{"ask": "q", "reply": "a"}, {"ask": "q", "reply": "b", "past": [["x", "y"]]}]
    path = write(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "ask", "response": "reply", "system": "sistem", "history": "past"}
    prepared = prepare(setup, path, source={"columns": columns})
    named = [warning for warning in prepared.summary.warnings() if "names" in warning]
    assert named == [f"`columns` of `{path}` names `sistem`, which no row has"]
    assert "x" in texts(setup, prepared)[1]


def test_reasoning_is_rendered_before_the_answer(tiny_tokenizer: Any, tmp_path: Path) -> None:
    row = chat("q", "a")
    row["messages"][1]["reasoning_content"] = "because"
    path = write(tmp_path / "a.jsonl", [row])
    kept, dropped = (
        prepare(prepare_tokenizer(tiny_tokenizer, ChatSection(reasoning=choice), {0, 11}), path)
        for choice in ("keep", "drop")
    )
    setup = prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11})
    assert trained(setup, kept.train[0]) == "<think>because</think>\na<|im_end|>"
    assert trained(setup, dropped.train[0]) == "a<|im_end|>"


BARE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.role + ': ' + m.content }}{% endif %}{% endfor %}"
)


def test_a_template_that_knows_less_than_the_row(tiny_tokenizer: Any, tmp_path: Path) -> None:
    template = tmp_path / "bare.jinja"
    template.write_text(BARE)
    setup = prepare_tokenizer(tiny_tokenizer, ChatSection(template=str(template)), {0, 11})
    thought = chat("q", "a")
    thought["messages"][1]["thinking"] = "because"
    assert trained(setup, prepare(setup, write(tmp_path / "a.jsonl", [thought])).train[0]) == (
        "<think>because</think>\na<|im_end|>"
    )
    with pytest.raises(DataError, match=r"`tools`: the chat template `.*` does not show them"):
        prepare(setup, write(tmp_path / "b.jsonl", [chat("q", "a") | {"tools": [{"name": "f"}]}]))
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    with pytest.raises(DataError, match=r"a tool call: the chat template `.*` does not render it"):
        prepare(setup, write(tmp_path / "c.jsonl", [{"messages": [chat("q", "a")["messages"][0], call]}]))


def test_names_are_rendered_by_templates_that_have_them(tiny_tokenizer: Any, tmp_path: Path) -> None:
    row = chat("q", "a")
    row["messages"][0]["name"] = "ada"
    path = write(tmp_path / "a.jsonl", [row])
    template = tmp_path / "named.jinja"
    template.write_text(BARE.replace("m.role + ': '", "(m.name or m.role) + ': '"))
    named = prepare_tokenizer(tiny_tokenizer, ChatSection(template=str(template)), {0, 11})
    assert texts(named, prepare(named, path)) == ["ada: qa<|im_end|>"]
    chatml = prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11})
    assert "columns not used: of turns `name`" in prepare(chatml, path).summary.warnings()


def test_calls_are_trained_as_the_system_turn_asks(setup: TemplateSetup, tmp_path: Path) -> None:
    question, answer = chat("area", "six")["messages"]
    arguments = {"a": 2, "b": 3}
    bare = {"name": "area", "arguments": arguments}
    forms = [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "area", "arguments": json.dumps(arguments)}}]},  # noqa: E501
        {"role": "assistant", "function_call": bare},
        {"from": "function_call", "value": json.dumps(bare)},
        {"from": "gpt", "value": f"<tool_call>\n{json.dumps(bare)}\n</tool_call>"},
    ]  # fmt: skip
    rows = [
        {"messages": [question, form, {"role": "tool", "content": "6"}, answer], "tools": [{"name": "area"}]}
        for form in forms
    ]
    prepared = prepare(setup, write(tmp_path / "a.jsonl", rows))
    assert len(set(texts(setup, prepared))) == 1
    assert trained(setup, prepared.train[0]) == (
        '<tool_call>{"name": "area", "arguments": {"a": 2, "b": 3}}</tool_call><|im_end|>six<|im_end|>'
    )


def test_a_template_that_never_ends_on_a_row_stops_the_run(tiny_tokenizer: Any, tmp_path: Path) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = tmp_path / "sometimes.jinja"
    template.write_text("{% if messages[0].content == 'go' %}" + endless + "{% endif %}" + BARE)
    tokenizer = prepare_tokenizer(tiny_tokenizer, ChatSection(template=str(template)), {0, 11})
    assert len(prepare(tokenizer, write(tmp_path / "a.jsonl", [chat("q", "a")] * 3)).train) == 3
    path = write(tmp_path / "b.jsonl", [chat("q", "a"), chat("go", "a"), chat("q", "a")])
    with pytest.raises(
        DataError, match=r"sometimes\.jinja`: the chat template takes more than 3 s of computing"
    ):
        prepare(tokenizer, path, on_bad_row="skip")
