"""Talking in a notebook: line by line, and through the widget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mamba_sft import Run, Sampling, chat
from mamba_sft.errors import UsageError
from mamba_sft.inference.answering import open_session
from mamba_sft.notebook.chatting import ChatWidget, Session, talk
from tests.notebook.conftest import HOSTILE, Kernel, is_safe


@pytest.fixture(scope="module")
def sessions(tiny_run: Run) -> tuple[Session, Session]:
    short = Sampling(max_new_tokens=3)
    return open_session(tiny_run, sampling=short), open_session(tiny_run, compare=True, sampling=short)


def talked(session: Session, *lines: str) -> str:
    given: Iterator[str] = iter(lines)
    written: list[str] = []

    def read(prompt: str) -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    talk(session, read, written.append)
    return "".join(written)


def test_line_by_line(sessions: tuple[Session, Session]) -> None:
    one, both = sessions
    one.reset()
    text = talked(one, "hello 1", "hello 2", "", "never read")
    assert text.startswith("a blank line ends the conversation\n")
    assert [turn["role"] for turn in one.messages] == ["user", "assistant"] * 2  # type: ignore[union-attr]
    assert "base: " in talked(both, "hello 1")
    assert "\ntuned: " in talked(both, "hello 1")


def test_where_nobody_can_type(sessions: tuple[Session, Session]) -> None:
    class StdinNotImplementedError(Exception):
        pass

    def read(prompt: str) -> str:
        raise StdinNotImplementedError(
            "raw_input was called, but this frontend does not support input requests."
        )

    written: list[str] = []
    talk(sessions[0], read, written.append)
    assert "`generate` answers a list of prompts" in written[-1]


@pytest.fixture(params=[0, 1], ids=["one", "compare"])
def widget(sessions: tuple[Session, Session], request: pytest.FixtureRequest) -> ChatWidget:
    pytest.importorskip("ipywidgets")
    session = sessions[request.param]
    session.reset()
    return ChatWidget(session)


def click(widget: ChatWidget, name: str) -> None:
    buttons: Any = widget.box.children[1].children[1:]
    next(button for button in buttons if button.description == name).click()


def test_the_widget_answers_and_takes_back(widget: ChatWidget) -> None:
    widget.line.value = HOSTILE
    assert widget.line.value == ""
    html = widget.conversation.value
    assert "&lt;script&gt;" in html
    assert is_safe(html)
    assert all(widget.exchanges[0].answers)
    answers = widget.exchanges[0].answers
    click(widget, "Retry")
    assert [one.answers for one in widget.exchanges] == [answers], "greedy: the same once more"
    click(widget, "Send")
    assert len(widget.exchanges) == 1
    click(widget, "Reset")
    assert not widget.exchanges
    click(widget, "Retry")
    assert not widget.exchanges


def test_an_error_is_shown_and_the_conversation_goes_on(
    widget: ChatWidget, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(text: str) -> None:
        raise UsageError("the message is <too long>", hint="say less")

    monkeypatch.setattr(widget.session, "send", refuse)
    widget.line.value = "hello"
    assert "the message is &lt;too long&gt;\nhint: say less" in widget.conversation.value
    monkeypatch.undo()
    widget.line.value = "hello"
    assert "too long" not in widget.conversation.value
    assert len(widget.exchanges) == 1


def test_chat_gives_a_widget_in_a_notebook_and_a_loop_elsewhere(
    tiny_run: Run, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ipywidgets")
    assert type(chat(tiny_run)).__name__ == "VBox"
    monkeypatch.setattr("mamba_sft.notebook.chatting.in_notebook", lambda: False)
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    assert chat(tiny_run) is None


def test_a_wrong_place_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(UsageError, match="no adapter"):
        chat("data/tiny-base", compare=True)
