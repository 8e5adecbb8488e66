from __future__ import annotations

import json
from typing import Any

import pytest

from mamba_sft.errors import DataError, MambaSFTError, ModelError, UsageError
from mamba_sft.inference.answering import generate
from mamba_sft.inference.chat_model import load_chat_model
from mamba_sft.inference.generation import State, stream
from mamba_sft.inference.sessions import ChatSession
from tests.inference.conftest import SHORT, say


def test_generate_answers_texts_chats_and_files_alike(chat_model, run, tmp_path):
    texts = ["hello", "what is 7", "the lazy dog 😀"]
    expected = [say(ChatSession(chat_model, sampling=SHORT), text) for text in texts]
    given = generate(chat_model, texts, sampling=SHORT)
    assert [one.text for one in given] == expected
    assert generate(chat_model, texts[0], sampling=SHORT) == given[:1]
    assert generate(chat_model, [{"role": "user", "content": texts[1]}], sampling=SHORT) == given[1:2]
    chats = [[{"role": "user", "content": text}] for text in texts]
    assert generate(chat_model, chats, sampling=SHORT, batch_size=2) == given
    source, output = tmp_path / "in.jsonl", tmp_path / "deep" / "out.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": texts[0], "id": 1}, {"prompt": texts[1]}, {"messages": chats[2]}]
    source.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    seen: list[int] = []
    assert (
        generate(run, source, output=output, sampling=SHORT, on_answer=lambda i, _: seen.append(i)) == given
    )
    assert sorted(seen) == [0, 1, 2]
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in written] == expected
    answer = {"answer": expected[0], "finish_reason": "length", "tokens": 12}
    assert written[0] == {"prompt": "hello", "id": 1} | answer
    assert written[2]["messages"] == chats[2]
    assert list(output.parent.iterdir()) == [output]
    other = generate(chat_model, texts[0], sampling=SHORT, system="quite another")
    assert other[0].text != expected[0]


def test_an_empty_system_message_of_a_line_is_none(chat_model, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "hello", "system": ""}\n{"prompt": "hello"}\n', encoding="utf-8")
    without, with_own = generate(chat_model, path, sampling=SHORT)
    assert chat_model.system
    assert without.prompt_tokens < with_own.prompt_tokens


def test_generate_raw_continues_a_base(base):
    chat_model = load_chat_model(base, needs_template=False)
    with pytest.raises(DataError, match="no chat template"):
        generate(chat_model, "hello")
    (answer,) = generate(chat_model, "hello world", raw=True, sampling=SHORT)
    ids = chat_model.tokenizer("hello world")["input_ids"]
    expected = list(stream(chat_model.model, ids, State(), sampling=SHORT, stop_ids=chat_model.stop_ids))
    assert answer.text == chat_model.tokenizer.decode(expected)
    with pytest.raises(UsageError, match="prompt 1: `raw` continues plain text"):
        generate(chat_model, [[{"role": "user", "content": "x"}]], raw=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b'"text"', "a line needs either `prompt` or `messages`"),
        (b'{"text": "x"}', "a line needs either `prompt` or `messages`"),
        (b'{"prompt": "x", "messages": []}', "a line needs either `prompt` or `messages`"),
        (b'{"prompt": 3}', "`prompt` is not a string"),
        (b'{"prompt": "  "}', "the prompt is empty"),
        (b'{"messages": "x"}', "`messages` is not a list"),
        (b'{"messages": []}', "there are no messages"),
        (b'{"messages": [{"role": "user"}]}', "a message needs `role` and `content`"),
        (b'{"messages": ["x"]}', "a message needs `role` and `content`"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "the last message is the assistant's own"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8"),
        (b'{"prompt": "a\\ud800"}', "\\ud800 is half a character"),
        (b'{"prompt": "a", "system": "\\ud800"}', "`system`: \\ud800 is half a character"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_loaded(tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        generate(tmp_path / "no-such-model", path, output=tmp_path / "out.jsonl")
    assert caught.value.message.startswith(f"{path}:3: {message}")
    assert not (tmp_path / "out.jsonl").exists()


def test_generate_refuses_early(tmp_path):
    nowhere = tmp_path / "no-such-model"
    cases: list[tuple[Any, dict[str, Any], type[MambaSFTError], str]] = [
        ("  ", {}, UsageError, "prompt 1: the prompt is empty"),
        (["x", ""], {}, UsageError, "prompt 2: the prompt is empty"),
        ([], {}, UsageError, "no prompts"),
        (tmp_path / "none.jsonl", {}, DataError, "no file"),
        ("x", {"output": tmp_path}, UsageError, "is a directory"),
        ("x", {"output": tmp_path / "answers.jsonl.gz"}, UsageError, "the name of a packed file"),
        ("x", {"output": "/dev/null"}, UsageError, "is a device or a pipe"),
        ("a\udcff", {}, UsageError, "prompt 1: .*udcff is half a character"),
        ("x", {"system": "\ud800"}, UsageError, "the system message: .*ud800 is half a character"),
        ("x", {"system": "Hi", "raw": True}, UsageError, "leaves the chat template out"),
        ("x", {}, ModelError, "no model directory"),
    ]
    for prompts, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            generate(nowhere, prompts, **options)
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no prompts"):
        generate(nowhere, tmp_path / "empty.jsonl")
