from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from mamba_sft.cli.terminal import _Columns, chat_loop
from mamba_sft.errors import UsageError
from mamba_sft.inference.answering import open_session
from mamba_sft.inference.sampling import Sampling
from mamba_sft.inference.sessions import ChatSession
from tests.inference.conftest import SHORT


def lines_of(*lines: str | BaseException) -> Callable[[str], str]:
    left: Iterator[str | BaseException] = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def chat(session: Any, *lines: str | BaseException, terminal: bool = True) -> str:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=terminal, width=100, height=30, color_system=None, legacy_windows=False
    )
    chat_loop(session, console, lines_of(*lines))
    return out.getvalue()


def test_a_pipe_gets_answers_only(chat_model):
    session = ChatSession(chat_model, sampling=SHORT)
    out = chat(session, "hello", "", "/system short", "more", terminal=False)
    answers = [turn["content"] for turn in session.messages if turn["role"] == "assistant"]
    assert out == "".join(answer + "\n" for answer in answers)
    assert len(answers) == 2
    with pytest.raises(UsageError, match="no command `/nope`"):
        chat(session, "/nope", terminal=False)


def test_a_terminal_shows_speed_size_and_errors(chat_model, tmp_path):
    session = ChatSession(chat_model, sampling=SHORT)
    file = tmp_path / "s.jsonl"
    out = chat(
        session, "hello", "/retry", "/undo", "/undo", "/nope", "/help", "/system", "/system be odd", "/save",
        "hi", f"/save {file}", "/reset", "/quit", "never read",
    )  # fmt: skip
    assert "no context limit" in out
    assert "12 tokens" in out
    assert "tokens/s" in out
    assert "tokens seen" in out
    assert "cut off" in out
    assert "took back: hello" in out
    assert "there is nothing to take back" in out
    assert "no command `/nope`" in out
    assert "Ctrl-C ends an answer" in out
    assert "system message: be brief" in out
    assert "system message: be odd" in out
    assert "`/save` needs a file" in out
    assert json.loads(file.read_text(encoding="utf-8"))["messages"][0]["content"] == "be odd"
    assert session.messages == []


def test_several_lines_in_quotation_marks_are_one_message(chat_model):
    session = ChatSession(chat_model, sampling=SHORT)
    chat(session, '"""', "one", "", "/two", '"""')
    assert [m["content"] for m in session.messages if m["role"] == "user"] == ["one\n\n/two"]
    chat(session, "/etc/hosts is a file")
    assert session.messages[-2]["content"] == "/etc/hosts is a file"


def test_ctrl_c_ends_the_answer_then_the_chat(chat_model, monkeypatch):
    session = ChatSession(chat_model, sampling=Sampling(50))
    original = chat_model.model.forward
    calls = [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(chat_model.model, "forward", interrupted)
    ctrl_c = KeyboardInterrupt()
    out = chat(session, "hello", "again", ctrl_c, "", ctrl_c, "then", ctrl_c, ctrl_c, "never read")
    assert "interrupted" in out
    assert "50 tokens" in out
    users = [turn["content"] for turn in session.messages if turn["role"] == "user"]
    assert users == ["hello", "again", "then"]
    assert out.count("once more leaves") == 3
    calls[0] = 0
    chat(session, "/reset", "hello", KeyboardInterrupt(), "never read")  # the second in a row
    assert len(session.messages) == 3


def test_what_a_model_writes_cannot_steer_the_terminal(chat_model, monkeypatch):
    session = ChatSession(chat_model, sampling=SHORT)
    monkeypatch.setattr(
        session, "_answer", lambda text: (piece for piece in ("\x1b", "[2Jred", "\a [b]x[/b]\r\n"))
    )
    out = chat(session, "hello")
    assert "\x1b[2J" not in out
    assert "\a" not in out
    assert "\\x1b[2Jred\\x07 [b]x[/b]\n" in out


def test_two_columns_side_by_side(chat_model):
    compared = open_session(chat_model, compare=True, sampling=SHORT)
    out = chat(compared, "hello", "/quit")
    assert any("base" in line and "tuned" in line for line in out.splitlines())
    assert out.count("12 tokens") == 2
    piped = chat(compared, "more", terminal=False)
    assert piped.startswith("base: ")
    assert "\ntuned: " in piped


def test_columns_show_the_end_of_texts_longer_than_the_screen():
    columns = _Columns(["base", "tuned"], tail=True)
    columns.texts = ["\n".join(f"left {i}" for i in range(100)), "right [bold]\x1b[2J"]
    console = Console(file=io.StringIO(), width=80, height=20, color_system=None)
    console.print(columns)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(out.splitlines()) <= 20
    assert "left 99" in out
    assert "left 50" not in out
    assert "right [bold]\\x1b[2J" in out
    columns.tail = False
    console.print(columns)
    assert "left 50" in console.file.getvalue()  # type: ignore[attr-defined]
