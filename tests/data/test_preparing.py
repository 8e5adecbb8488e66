from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.data.preparing import PreparedData, prepare_data
from mamba_sft.data.rows import IGNORED
from mamba_sft.errors import DataError
from mamba_sft.model.chat_template import TemplateSetup, prepare_tokenizer
from mamba_sft.recipe.fields import ChatSection, DataSection, SourceSection


@pytest.fixture
def setup(tiny_tokenizer: Any) -> TemplateSetup:
    return prepare_tokenizer(tiny_tokenizer, ChatSection(), {0, 11})


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def prepare(
    setup: TemplateSetup,
    *paths: Path,
    weights: tuple[float, ...] = (),
    formats: tuple[Any, ...] = (),
    **fields: Any,
) -> PreparedData:
    system, seed = fields.pop("system", None), fields.pop("seed", 0)
    sources = [
        SourceSection(
            path=str(path),
            weight=weights[i] if weights else 1.0,
            format=formats[i] if formats else "auto",
            **fields.pop("source", {}),
        )
        for i, path in enumerate(paths)
    ]
    data = DataSection(sources=sources, **({"validation": 0} | fields))
    return prepare_data(data, setup, system=system, seed=seed)


def texts(setup: TemplateSetup, prepared: PreparedData, split: str = "train") -> list[str]:
    return [setup.tokenizer.decode(row["input_ids"]) for row in getattr(prepared, split)]


def origins(prepared: PreparedData) -> list[str]:
    return list(prepared.train["where"])


def trained(setup: TemplateSetup, row: dict[str, Any]) -> str:
    return str(setup.tokenizer.decode([label for label in row["labels"] if label != IGNORED]))


def test_chats_train_on_answers_and_end_with_the_last_stop_token(
    setup: TemplateSetup, tmp_path: Path
) -> None:
    turns = [*chat("one", "two")["messages"], *chat("three", "four")["messages"]]
    prepared = prepare(setup, write(tmp_path / "a.jsonl", [{"messages": turns}]), system="be kind")
    row = prepared.train[0]
    assert setup.tokenizer.decode(row["input_ids"]) == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
        "two<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>"
    )
    assert trained(setup, row) == "two<|im_end|>four<|im_end|>"
    assert all(
        label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )
    assert origins(prepared) == [f"{tmp_path / 'a.jsonl'}:1"]


def test_all_tokens_are_trained_on_request(setup: TemplateSetup, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("one", "two")])
    row = prepare(setup, path, assistant_only_loss=False).train[0]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_a_template_without_marks_is_fine_when_all_tokens_are_trained(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    )
    setup = prepare_tokenizer(tiny_tokenizer, ChatSection(template="tokenizer"), {0})
    path = write(tmp_path / "a.jsonl", [chat("one", "two")])
    assert texts(setup, prepare(setup, path, assistant_only_loss=False)) == [
        "user: one<|endoftext|>assistant: two<|endoftext|>"
    ]
    with pytest.raises(DataError, match=r"`tokenizer` has no .% generation %. marks"):
        prepare(setup, path)


def test_completions_and_texts_are_plain_and_stop(setup: TemplateSetup, tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "hello ", "completion": " world"}])
    plain = write(tmp_path / "plain.jsonl", [{"text": "the quick fox"}, {"text": "already ends<|im_end|>"}])
    prepared = prepare(setup, pairs, plain, formats=("plain_completion", "auto"))
    assert texts(setup, prepared) == [
        "hello  world<|im_end|>",
        "the quick fox<|im_end|>",
        "already ends<|im_end|>",
    ]
    assert trained(setup, prepared.train[0]) == " world<|im_end|>"
    row = prepared.train[1]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_text_that_is_a_chat_already_is_not_stopped_twice_and_told(
    setup: TemplateSetup, tmp_path: Path
) -> None:
    turns = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>\n"
    prepared = prepare(setup, write(tmp_path / "a.jsonl", [{"text": turns}, {"text": "the quick fox"}]))
    assert texts(setup, prepared) == [turns.rstrip(), "the quick fox<|im_end|>"]
    told = [warning for warning in prepared.summary.warnings() if "chat marks" in warning]
    assert len(told) == 1
    assert "in 1 row" in told[0]
    assert "`messages`" in told[0]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "<s>[INST] hello [/INST] world </s>"},
        {"text": "### Human: hello\n### Assistant: world"},
        {"prompt": "<s>[INST] hello [/INST]", "completion": "world"},
        chat("<start_of_turn>user\nhello<end_of_turn>", "world"),
        chat("<|im_start|>user\nhello", "world"),
    ],
)
def test_marks_of_other_models_are_told(setup: TemplateSetup, tmp_path: Path, row: dict[str, Any]) -> None:
    plain = chat("what is [INST] for?", "world")  # a text may speak of marks
    prepared = prepare(setup, write(tmp_path / "a.jsonl", [row]), write(tmp_path / "b.jsonl", [plain]))
    told = [warning for warning in prepared.summary.warnings() if "[INST]" in warning]
    assert len(told) == 1
    assert "the text of 1 row and" in told[0]


def test_text_beside_chats_is_told_to_be_trained_whole(setup: TemplateSetup, tmp_path: Path) -> None:
    chats = write(tmp_path / "a.jsonl", [chat("hello", "world")])
    plain = write(tmp_path / "b.jsonl", [{"text": "the quick fox"}])
    said = "1 row of text outside the chat template: all of a text is trained"
    assert any(said in warning for warning in prepare(setup, chats, plain).summary.warnings())
    assert not any(said in warning for warning in prepare(setup, chats).summary.warnings())


def test_answers_inside_a_prompt_are_context(setup: TemplateSetup, tmp_path: Path) -> None:
    row = {"prompt": chat("one", "two")["messages"] + chat("three", "-")["messages"][:1],
           "completion": chat("-", "four")["messages"][1:]}  # fmt: skip
    prepared = prepare(setup, write(tmp_path / "a.jsonl", [row]))
    assert trained(setup, prepared.train[0]) == "four<|im_end|>"


def test_tools_reach_the_rows(setup: TemplateSetup, tmp_path: Path) -> None:
    row = chat("one", "two") | {"tools": [{"name": "add"}]}
    assert '{"name": "add"}' in texts(setup, prepare(setup, write(tmp_path / "a.jsonl", [row])))[0]


def bad_file(path: Path, count: int = 12) -> Path:
    bad = ['{"messages": oops}', {"messages": [{"role": "usr", "content": "q"}]}, {"text": "t"}]
    rows = [
        chat("fine", "yes"),
        *(bad * count)[:count],
        {"messages": []},
        chat("also", "fine"),
    ]
    return write(path, rows)


def test_bad_rows_stop_and_are_told_by_their_reasons(setup: TemplateSetup, tmp_path: Path) -> None:
    path = bad_file(tmp_path / "a.jsonl", 11)
    with pytest.raises(DataError) as error:
        prepare(setup, path)
    lines = error.value.message.splitlines()
    assert lines[0] == "12 of 14 rows cannot be trained on:"
    assert lines[1] == f"  4 rows: not JSON: Expecting value, column 14; first at {path}:2"
    assert lines[2].startswith("  4 rows: turn 1: unknown role 'usr'; did you mean `user`?")
    assert lines[3].startswith("  3 rows: not messages: it looks like text")
    assert lines[4] == f"  {path}:13: `messages` is empty"
    assert len(lines) == 5
    assert "data.on_bad_row: skip" in str(error.value.hint)


def test_ten_reasons_are_listed(setup: TemplateSetup, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": f"role {chr(97 + i)}", "content": "q"}]} for i in range(13)]
    with pytest.raises(DataError) as error:
        prepare(setup, write(tmp_path / "a.jsonl", rows))
    lines = error.value.message.splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  ... and 3 more"


def test_bad_rows_are_skipped_counted_and_written(setup: TemplateSetup, tmp_path: Path) -> None:
    path = bad_file(tmp_path / "a.jsonl", 3)
    prepared = prepare(setup, path, on_bad_row="skip")
    rejected = prepared.rejected
    assert rejected is not None
    assert len(prepared.train) == 2
    assert (prepared.summary.read, prepared.summary.bad) == (6, 4)
    entries = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [entry["where"] for entry in entries] == [f"{path}:{line}" for line in (2, 3, 4, 5)]
    assert entries[0]["row"] == '{"messages": oops}'
    assert entries[3]["row"] == {"messages": []}
    assert "`messages` is empty" in entries[3]["reason"]


def test_rejected_rows_may_hold_what_utf8_cannot(setup: TemplateSetup, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("q", "a"), chat("q", "é \ud83d")])
    rejected = prepare(setup, path, on_bad_row="skip").rejected
    assert rejected is not None
    assert json.loads(rejected.read_text())["row"] == chat("q", "é \ud83d")
    assert "é" in rejected.read_text()


def test_without_bad_rows_none_are_rejected(setup: TemplateSetup, tmp_path: Path) -> None:
    prepared = prepare(setup, write(tmp_path / "a.jsonl", [chat("q", "a")]), on_bad_row="skip")
    assert prepared.rejected is None


def test_rows_the_template_refuses_are_bad_rows(tiny_tokenizer: Any, tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"  # noqa: E501
        "{{ m.role }}: {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}".replace(
            "{% generation %}", "{% if m.role == 'assistant' %}{% generation %}"
        ).replace("{% endgeneration %}", "{% endgeneration %}{% endif %}")
    )
    setup = prepare_tokenizer(tiny_tokenizer, ChatSection(template=str(template)), {0})
    rows = [chat("q", "a"), {"messages": [{"role": "system", "content": "s"}, *chat("q", "a")["messages"]]}]
    with pytest.raises(DataError, match=r"a\.jsonl:2: the chat template refuses .*no system turn here"):
        prepare(setup, write(tmp_path / "a.jsonl", rows))


def test_each_file_has_its_own_format(setup: TemplateSetup, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [chat("q", "a")])
    write(tmp_path / "b.jsonl", [{"instruction": "i", "output": "o"}])
    summary = prepare(setup, tmp_path / "*.jsonl").summary
    assert list(summary.sources[0].formats.values()) == ["messages", "alpaca"]
    assert "looked at the only row" in summary.sources[0].seen[0]


def test_a_file_with_nothing_readable(setup: TemplateSetup, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the first 2 rows can be read: .*a\.jsonl:1: not JSON"):
        prepare(setup, write(tmp_path / "a.jsonl", ["x", "y"]), on_bad_row="skip")


def test_nothing_left_says_why(setup: TemplateSetup, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [chat("the fox " * 20, "yes"), chat("q", "yes " * 50), {"messages": []}]
    )
    with pytest.raises(DataError) as error:
        prepare(setup, path, max_length=16, too_long="drop", on_bad_row="skip")
    said, bad = error.value.message.splitlines()
    assert said == "no row is left to train on: 3 read, 1 bad, 2 longer than data.max_length 16"
    assert bad == f"  {path}:3: `messages` is empty"
    with pytest.raises(DataError, match=r"1 with no trained token within data\.max_length"):
        prepare(setup, write(tmp_path / "b.jsonl", [chat("the fox " * 20, "yes")]), max_length=16)


def test_truncated_rows_keep_their_beginning(setup: TemplateSetup, tmp_path: Path) -> None:
    rows = [chat("q", "word " * 50), chat("fox " * 40, "lost"), chat("q", "a")]
    whole = prepare(setup, write(tmp_path / "a.jsonl", rows), max_length=None)
    cut = prepare(setup, tmp_path / "a.jsonl", max_length=24)
    assert [len(ids) for ids in cut.train["input_ids"]] == [24, len(whole.train[2]["input_ids"])]
    assert cut.train[0]["input_ids"] == whole.train[0]["input_ids"][:24]
    summary = cut.summary
    assert (summary.truncated, summary.untrained, summary.dropped, summary.split) == (1, 1, 0, 0)


def test_split_rows_lose_no_trained_token_but_the_first_of_a_piece(
    setup: TemplateSetup, tmp_path: Path
) -> None:
    rows = [chat("fox " * 40, "word " * 50)]
    whole = prepare(setup, write(tmp_path / "a.jsonl", rows), max_length=None).train[0]
    prepared = prepare(setup, tmp_path / "a.jsonl", max_length=24, too_long="split")
    pieces = prepared.train["input_ids"][:]
    joined = [token for piece in pieces for token in piece]
    assert whole["input_ids"][-len(joined) :] == joined
    assert all(len(piece) == 24 for piece in pieces[:-1])
    labels = prepared.train["labels"][:]
    assert all(any(label != IGNORED for label in piece) for piece in labels)
    assert all(piece[0] == IGNORED for piece in labels)
    lost = sum(label != IGNORED for label in whole["labels"]) - prepared.summary.trained_tokens
    assert 0 <= lost <= len(pieces)
    assert (prepared.summary.split, prepared.summary.pieces) == (1, len(pieces))
    assert origins(prepared) == [f"{tmp_path / 'a.jsonl'}:1"] * len(pieces)


def test_dropped_rows_are_counted(setup: TemplateSetup, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("q", "word " * 50), chat("q", "a")])
    prepared = prepare(setup, path, max_length=24, too_long="drop")
    assert (len(prepared.train), prepared.summary.dropped) == (1, 1)


@pytest.mark.parametrize(("validation", "expected"), [(0, 0), (0.25, 5), (3, 3), (0.001, 1)])
def test_validation_is_a_share_or_a_number(
    setup: TemplateSetup, tmp_path: Path, validation: float, expected: int
) -> None:
    path = write(tmp_path / "a.jsonl", [chat(f"q {i}", "a") for i in range(20)])
    prepared = prepare(setup, path, validation=validation)
    held_out = texts(setup, prepared, "validation") if prepared.validation else []
    assert len(held_out) == expected
    assert sorted(texts(setup, prepared) + held_out) == sorted(texts(setup, prepare(setup, path)))


def test_validation_depends_on_the_seed_and_nothing_else(setup: TemplateSetup, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat(f"q {i}", "a") for i in range(30)])
    first, again, other = (
        list(prepare(setup, path, validation=5, seed=s).validation["input_ids"])  # type: ignore[index]
        for s in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_duplicates_never_straddle_the_split(setup: TemplateSetup, tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [chat(f"q {i % 6}", "a") for i in range(24)])
    b = write(tmp_path / "b.jsonl", [chat(f"q {i}", "a") for i in range(6)])
    prepared = prepare(setup, a, b, weights=(3.0, 1.0), validation=2)
    held_out = texts(setup, prepared, "validation")
    assert len(set(held_out)) == len(held_out) == 2
    assert not set(held_out) & set(texts(setup, prepared))
    assert len(prepared.train) == 4 * (3 * 4 + 1)
    assert (prepared.summary.duplicates, prepared.summary.validation_duplicates) == (24, 8)


def test_weights_give_copies_and_shares(setup: TemplateSetup, tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [chat(f"first {i}", "a") for i in range(10)])
    b = write(tmp_path / "b.jsonl", [chat(f"second {i}", "a") for i in range(10)])
    prepared = prepare(setup, a, b, weights=(2.5, 0.3))
    counts = [origins(prepared).count(f"{a}:{i + 1}") for i in range(10)]
    assert sorted(counts) == [2] * 5 + [3] * 5
    assert sum(str(b) in origin for origin in origins(prepared)) == len({*origins(prepared)}) - 10 == 3
    assert [source.train_rows for source in prepared.summary.sources] == [25, 3]
    assert origins(prepare(setup, a, b, weights=(2.5, 0.3))) == origins(prepared)
    assert origins(prepare(setup, a, b, weights=(2.5, 0.3), seed=1)) != origins(prepared)


def test_too_many_validation_rows(setup: TemplateSetup, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("same", "a")] * 5 + [chat("other", "a")])
    with pytest.raises(DataError, match="holds out 2 rows of 2 different ones"):
        prepare(setup, path, validation=2)
    single = prepare(setup, write(tmp_path / "b.jsonl", [chat("same", "a")]), validation=0.5)
    assert single.validation is None
    assert "no validation rows" in single.summary.warnings()[-1]


def test_the_report_counts_tokens(setup: TemplateSetup, tmp_path: Path) -> None:
    rows = [chat(f"q {i}", "fox " * (i + 1)) for i in range(10)]
    rows[0]["messages"].append({"role": "user", "content": "bye"})
    prepared = prepare(setup, write(tmp_path / "a.jsonl", rows), validation=2)
    summary = prepared.summary
    lengths = [len(ids) for ids in prepared.train["input_ids"]]
    assert summary.lengths.tolist() == lengths
    assert summary.train_tokens == sum(lengths)
    assert summary.trained_tokens == sum(
        label != IGNORED for row in prepared.train["labels"] for label in row
    )
    assert (summary.train_rows, summary.validation_rows, summary.trimmed) == (8, 2, 1)
    as_json = json.loads(json.dumps(summary.to_dict()))
    assert as_json["sources"][0]["read"] == 10
    assert as_json["trained_share"] == summary.trained_tokens / summary.train_tokens
    assert "1 chats lose their last turns" in as_json["warnings"][0]


def test_several_batches_keep_their_order(
    setup: TemplateSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mamba_sft.data.tokenizing._BATCH", 7)
    rows: list[Any] = [chat(f"q {i}", f"a {i}") for i in range(30)]
    rows[11] = "not json"
    prepared = prepare(setup, write(tmp_path / "a.jsonl", rows), on_bad_row="skip")
    assert [trained(setup, row) for row in prepared.train] == [
        f"a {i}<|im_end|>" for i in range(30) if i != 11
    ]


def test_chats_are_trained_on_answers_and_the_texts_beside_them_whole(
    setup: TemplateSetup, tmp_path: Path
) -> None:
    chats = write(tmp_path / "a.jsonl", [chat("hello", "world")])
    text = "the quick brown fox jumps over the lazy dog " * 12
    (tmp_path / "b.txt").write_text(f"{text}\n\n{text}")
    sources = [
        SourceSection(path=str(chats)),
        SourceSection(path=str(tmp_path / "b.txt"), format="text", sample_by="document"),
    ]
    data = DataSection(sources=sources, validation=0, max_length=64, too_long="split")
    assert data.assistant_only_loss
    prepared = prepare_data(data, setup, system=None, seed=0)
    rows = list(prepared.train)
    of_chats = [row for row in rows if "a.jsonl" in row["where"]]
    of_texts = [row for row in rows if "b.txt" in row["where"]]
    assert [trained(setup, row) for row in of_chats] == ["world<|im_end|>"]
    assert len(of_texts) > 3
    for row in of_texts:
        assert [label == IGNORED for label in row["labels"]] == [True] + [False] * (len(row["labels"]) - 1)
    whole = "".join(setup.tokenizer.decode(row["input_ids"]) for row in sorted(of_texts, key=_piece))
    assert whole.count("lazy dog") == 24


def _piece(row: dict[str, Any]) -> str:
    return str(row["where"])
