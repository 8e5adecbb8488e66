"""Rows that people really had, and what each is to become; skipped where they are not beside us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mamba_sft.data.preparing import PreparedData, prepare_data
from mamba_sft.errors import DataError
from mamba_sft.json_lines import read_prompt_file
from mamba_sft.model.chat_template import TemplateSetup, prepare_tokenizer
from mamba_sft.recipe.fields import ChatSection, DataSection, SourceSection
from tests.data.test_preparing import texts, trained
from tests.data.test_readers import write as write_file

CASES = Path(__file__).parents[3] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the collected cases are not beside this checkout")

TRAINED = {
    "03-prompt-completion-texts.jsonl": ["Blue.", "Trout."],
    "04-weight-zero.jsonl": ["Four."],
    "09-alpaca-history.jsonl": ["Three.<|im_end|>Nine."],
    "10-reasoning-field.jsonl": ["<think>Count on two from two.</think>\nFour."],
    "12-sharegpt-function-call.jsonl": [
        '<tool_call>{"name": "area", "arguments": {"a": 2, "b": 3}}</tool_call><|im_end|>Six.'
    ],
    "13-tool-arguments-empty.jsonl": [
        '<tool_call>{"name": "lamp_off", "arguments": {}}</tool_call><|im_end|>It is off.'
    ],
    "16-parts-under-value.jsonl": ["Blue."],
    "21-other-column-names.jsonl": ["Blue.", "Trout."],
    "22-role-names.jsonl": ["b"],
    "23-assistant-first.jsonl": ["Blue."],
    "24-system-in-two-places.jsonl": ["Hello", "Hello<|im_end|>Blue."],
    "26-human-assistant-pairs.jsonl": ["Hello<|im_end|>See you"],
    "28-nan-input.jsonl": ["Blue."],
}
"""File -> what is trained of its rows, those that repeat left out."""

REFUSED = {
    "06-kto-label-messages.jsonl": "is preference data: 2 of the 2 rows looked at have `label`",
    "08-chosen-beside-conversations.jsonl": "is preference data: 2 of the 2 rows looked at have `chosen` and",
    "15-images-column.jsonl": "`images` has entries; only text can be trained on",
    "25-answer-in-two-turns.jsonl": "turn 3: the call in turn 2 has no tool turn",
    "27-lists-in-csv.csv": "`messages` is a Python list written as text, not JSON",
    "34-deep-json-cell.csv": "is JSON nested too deeply",
}


@pytest.fixture
def setup(tiny_tokenizer: Any) -> TemplateSetup:
    return prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11})


def prepare(setup: TemplateSetup, name: str, **source: Any) -> PreparedData:
    data = DataSection(sources=[SourceSection(path=str(CASES / name), **source)], validation=0)
    return prepare_data(data, setup, system=None, seed=0)


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained(setup: TemplateSetup, name: str) -> None:
    found = dict.fromkeys(trained(setup, row) for row in prepare(setup, name).train)
    assert [text.removesuffix("<|im_end|>") for text in found] == TRAINED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(setup: TemplateSetup, name: str) -> None:
    with pytest.raises(DataError) as error:
        prepare(setup, name)
    assert REFUSED[name] in error.value.message


def test_preferred_answers(setup: TemplateSetup) -> None:
    for name, answer in (
        ("06-kto-label-messages.jsonl", "Blue."),
        ("08-chosen-beside-conversations.jsonl", "Red."),
    ):
        rows = prepare(setup, name, preference="chosen").train
        assert {trained(setup, row) for row in rows} == {f"{answer}<|im_end|>"}


def test_systems_and_greetings_are_rendered(setup: TemplateSetup) -> None:
    joined, later = texts(setup, prepare(setup, "24-system-in-two-places.jsonl"))
    assert joined.startswith("<|im_start|>system\nYou are brief.\n\nYou like cats.<|im_end|>\n")
    assert "<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" in later
    greeting = texts(setup, prepare(setup, "23-assistant-first.jsonl"))[0]
    assert greeting.startswith("<|im_start|>assistant\nWelcome! What can I do?<|im_end|>\n<|im_start|>user\n")


def test_text_that_is_a_chat_already(setup: TemplateSetup) -> None:
    prepared = prepare(setup, "17-text-already-chatml.jsonl")
    assert {text.count("<|im_end|>") for text in texts(setup, prepared)} == {2}
    told = next(one for one in prepared.summary.warnings() if "chat marks already in 2 rows" in one)
    assert "the users' turns too; as `messages` only answers would be" in told


def test_a_value_that_python_cannot_hold_has_its_place(setup: TemplateSetup) -> None:
    with pytest.raises(DataError, match=r"33-number-too-large\.parquet: row 1: Python cannot hold a value"):
        prepare(setup, "33-number-too-large.parquet")


@pytest.mark.parametrize("name", ["29-prompts-with-bom.jsonl", "32-prompts-line-separator.jsonl"])
def test_prompts_are_read_as_data_is(name: str) -> None:
    (row,) = read_prompt_file(CASES / name)
    assert row.value["prompt"] == ("Name a colour." if "bom" in name else "Name\u2028a colour.")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chats.jsonl.gz", b'{"text": "hello"}\n'),
        ("chats.jsonl.zst", b'{"text": "hello"}\n'),
        ("chats.ndjson", b'{"text": "hello"}\n'),
        ("chats.tsv", b"text\nhello\n"),
        ("corpus.txt", b"hello\n"),
        ("saved", b""),
    ],
)
def test_files_that_were_not_read(setup: TemplateSetup, tmp_path: Path, name: str, content: bytes) -> None:
    assert name in (CASES / "30-unread-files.txt").read_text() or name == "saved"
    if content:
        write_file(tmp_path / name, content)
    else:
        from datasets import Dataset

        Dataset.from_list([{"text": "hello"}]).save_to_disk(str(tmp_path / name))
    assert texts(setup, prepare(setup, str(tmp_path / name))) == ["hello<|im_end|>"]
