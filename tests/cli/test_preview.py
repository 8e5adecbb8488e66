from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console, RenderableType

from mamba_sft.cli import preview
from mamba_sft.data.preparing import PreparedData, prepare_data
from mamba_sft.data.rows import IGNORED
from mamba_sft.data.summary import DataSummary
from mamba_sft.model.chat_template import TemplateSetup, prepare_tokenizer
from mamba_sft.recipe.fields import ChatSection, DataSection, SourceSection


@pytest.fixture
def setup(tiny_tokenizer: Any) -> TemplateSetup:
    return prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11})


@pytest.fixture
def prepared(setup: TemplateSetup, tmp_path: Path) -> PreparedData:
    path = tmp_path / "chats.jsonl"
    rows = [[("user", f"the fox {i}"), ("assistant", "word " * i + "dog 😀")] for i in range(40)] + [
        [("user", "x")]
    ]
    lines = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataSection(sources=[SourceSection(path=str(path))], max_length=64, on_bad_row="skip")
    return prepare_data(data, setup, system=None, seed=0)


def shown(renderable: RenderableType, width: int = 100) -> str:
    console = Console(width=width, record=True, no_color=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_trained_text_stands_between_brackets_without_colour(setup: TemplateSetup) -> None:
    ids = setup.tokenizer.encode("<|im_start|>user\n\thi  there<|im_end|>\nyes 😀<|im_end|>")
    start = len(setup.tokenizer.encode("<|im_start|>user\n\thi  there<|im_end|>\n"))
    labels = [IGNORED] * start + ids[start:]
    text = preview.token_text(setup.tokenizer, ids, labels)
    assert text.plain == "<|im_start|>user↵\n→hi··there<|im_end|>↵\n⟦yes 😀<|im_end|>⟧"


def test_every_token_has_the_style_of_its_kind(setup: TemplateSetup) -> None:
    ids = setup.tokenizer.encode("<|im_end|>fox<|im_end|>")
    text = preview.token_text(setup.tokenizer, ids, [IGNORED, *ids[1:]])
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans if span.start > 0}
    assert text.spans[0].style == preview.SPECIAL
    assert styles["<|im_end|>"] == preview.TRAINED_SPECIAL
    assert {str(span.style) for span in text.spans} & set(preview.TRAINED)


def test_control_characters_cannot_reach_the_terminal(setup: TemplateSetup) -> None:
    ids = setup.tokenizer.encode("a\x1b[31m[red]\x00\r")
    text = preview.token_text(setup.tokenizer, ids, ids)
    assert "\x1b" not in text.plain
    assert "\\x1b[31m[red]\\x00\\r" in text.plain.replace(" ", "")


def test_characters_of_several_tokens_are_shown_whole_even_at_the_border(setup: TemplateSetup) -> None:
    ids = setup.tokenizer.encode("世界🤷🏽‍♀️")
    assert len(ids) > 10
    assert preview.token_text(setup.tokenizer, ids, [IGNORED] * len(ids)).plain == "世界🤷🏽‍♀️"
    cut = preview.token_text(setup.tokenizer, ids, [IGNORED, *ids[1:]]).plain
    assert cut.startswith("�⟦")


def test_long_rows_leave_out_their_middle(setup: TemplateSetup) -> None:
    ids = setup.tokenizer.encode("dog " * 500)
    text = preview.token_text(setup.tokenizer, ids, ids, limit=30).plain
    assert f"… {len(ids) - 30:,} tokens …" in text
    assert len(text) < 200
    assert text.count("⟦") == text.count("⟧") == 2


def test_the_whole_picture(setup: TemplateSetup, prepared: PreparedData) -> None:
    packing = prepared.packing
    text = shown(preview.overview(prepared, setup.tokenizer, rows=2, packing=packing))
    assert "⟦trained tokens<|stop|>⟧" in text
    assert text.count("chats.jsonl:") == 2
    assert "row lengths in tokens" in text
    assert "limit 64" in text
    assert f"{packing.rows} of 64 tokens, {packing.fill:.1%} full" in text
    assert "39 to train on, 1 to validate on" in text
    assert "! 1 of 41 rows are bad and left out" in text
    assert f"{prepared.summary.truncated} truncated" in text
    assert "█" in text


def test_packing_is_counted_exactly(prepared: PreparedData) -> None:
    rows = prepared.train_rows
    packing = prepared.packing
    assert packing.rows == len(rows)
    assert packing.fill == sum(len(row["input_ids"]) for row in rows) / (len(rows) * 64)


def test_the_histogram_counts_every_row(prepared: PreparedData) -> None:
    lines = [line for line in shown(preview.histogram(prepared.summary)).splitlines() if " to " in line]
    assert sum(int(line.split()[-2].replace(",", "")) for line in lines) == prepared.summary.train_rows
    assert len(lines) <= 12


@pytest.mark.parametrize("lengths", [[], [1], [5] * 3, [1, 100_000], list(range(1, 2049))])
def test_the_histogram_takes_any_lengths(lengths: list[int]) -> None:
    assert shown(preview.histogram(DataSummary(lengths=np.array(lengths, dtype=np.int32))))


def test_narrow_terminals_wrap(setup: TemplateSetup, prepared: PreparedData) -> None:
    assert max(map(len, shown(preview.overview(prepared, setup.tokenizer), width=40).splitlines())) <= 40


def test_json_has_the_same_facts(setup: TemplateSetup, prepared: PreparedData) -> None:
    packing = prepared.packing
    content = json.loads(json.dumps(preview.to_dict(prepared, setup.tokenizer, rows=2, packing=packing)))
    assert content["train_rows"] == 39
    assert content["packed"] == {"rows": packing.rows, "max_length": 64, "fill": packing.fill}
    row = content["rows"][0]
    assert row["where"].endswith("chats.jsonl:1")
    assert row["trained_text"] in row["text"]
    assert len(row["input_ids"]) == len(row["labels"])


def test_stages_say_what_each_reads(prepared: PreparedData) -> None:
    stages = [{"first": 1, "last": 10, "max_length": 64, "tokens": {"chats": 300, "code": 100}}]
    mixture = {"stages": stages, "passes": {"chats": 0.5, "code": 2.0}}
    text = " ".join(shown(preview.statistics(prepared.summary, None, None, mixture), width=100).split())
    assert "1 steps 1 to 10, rows up to 64 tokens: 400 tokens, chats 75.0%, code 25.0%" in text
    assert "read in all: chats 0.5 times, code 2 times" in text
    assert "an epoch, " not in text
