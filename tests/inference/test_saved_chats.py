from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.errors import UsageError
from mamba_sft.inference.saved_chats import add_chat, last_chat

CHAT = [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]


def test_the_last_one_comes_back_whatever_an_editor_did(tmp_path: Path) -> None:
    file = tmp_path / "new" / "chats.jsonl"
    add_chat(file, [{"role": "system", "content": "x"}, *CHAT])
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    add_chat(file, CHAT)
    assert last_chat(file) == CHAT
    assert len(file.read_text().split("\n")) == 3


def test_a_packed_file_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps({"messages": CHAT}).encode()))
    before = file.read_bytes()
    with pytest.raises(UsageError, match="packed") as caught:
        add_chat(file, CHAT)
    assert caught.value.hint == f"for example `{tmp_path / 'chats.jsonl'}`"
    assert file.read_bytes() == before
    assert last_chat(file) == CHAT


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "chats.jsonl:2: no conversation of texts"),
        ({"messages": "x"}, "no conversation of texts"),
        ({"messages": [{"role": "user"}]}, "no conversation of texts"),
        ({"messages": []}, "but none"),
        ({"messages": CHAT[:1]}, "but user"),
        ({"messages": CHAT[::-1]}, "but assistant, user"),
        ({"messages": [{"role": "system", "content": "x"}]}, "but none"),
        ([1], "no conversation of texts"),
    ],
)
def test_what_cannot_be_gone_on_with(tmp_path: Path, row: Any, message: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps(row))
    with pytest.raises(UsageError) as caught:
        last_chat(file)
    assert message in str(caught.value)


def test_what_is_no_file_of_chats(tmp_path: Path) -> None:
    for name, text in {"empty.jsonl": "\n", "text.jsonl": "once\n"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=name):
            last_chat(tmp_path / name)
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UsageError, match="cannot load"):
            last_chat(path)
