"""The question about an adapter that no disk takes: asked once, and never given up by chance."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from mamba_sft.cli import unsaved
from mamba_sft.cli.unsaved import ask_on_terminal
from mamba_sft.training.keeping import Unsaved

FULL = Unsaved(Path("runs/a/adapter"), 1_234_567, 1000, "its disk is full (1,000 bytes left)")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed on a terminal."""
    text = io.StringIO()
    monkeypatch.setattr(unsaved, "err", Console(file=text, force_terminal=True, color_system=None, width=200))
    return text


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is typed, one after the other: a line, None for nothing in time, or an exception."""
    typed: list[object] = []

    def line(seconds: float) -> object:
        answer = typed.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(unsaved, "_line_within", line)
    return typed


def question() -> unsaved._Question:
    return unsaved._Question()


def test_it_is_asked_once_until_something_changes(answers: list[object], shown: io.StringIO) -> None:
    ask = question()
    answers += [None, None, None, "", None]
    assert ask(FULL, 10) is None
    assert ask(Unsaved(FULL.place, FULL.nbytes, 2000, "its disk is full (1.95 KiB left)"), 10) is None
    assert shown.getvalue().count("1,234,567 bytes") == 1
    assert ask(Unsaved(FULL.place, FULL.nbytes, 2000, "its file system is read-only"), 10) is None
    assert shown.getvalue().count("1,234,567 bytes") == 2
    ask(FULL, 10)
    ask(FULL, 10)
    assert shown.getvalue().count("1,234,567 bytes") == 4, "who presses Enter is told what came of it"


def test_answers(answers: list[object], shown: io.StringIO) -> None:
    answers += ["/mnt/x y", "", "Give up"]
    ask = question()
    assert ask(FULL, 10) == Path("/mnt/x y")
    assert ask(FULL, 10) is None
    with pytest.raises(KeyboardInterrupt):
        ask(FULL, 10)


def test_a_place_of_nobody_is_asked_for_again(answers: list[object], shown: io.StringIO) -> None:
    answers += ["~no-such-user/x", "~/x"]
    ask = question()
    assert ask(FULL, 10) is None
    assert "there is no user `no-such-user` here" in shown.getvalue()
    assert ask(FULL, 10) == Path.home() / "x"


def test_ctrl_c_has_to_be_meant(answers: list[object], shown: io.StringIO) -> None:
    answers += [KeyboardInterrupt(), None, "", KeyboardInterrupt(), KeyboardInterrupt()]
    ask = question()
    for _ in range(4):
        assert ask(FULL, 10) is None
    assert shown.getvalue().count("once more gives it up") == 2
    with pytest.raises(KeyboardInterrupt):
        ask(FULL, 10)


def test_a_pipe_that_ends_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert ask_on_terminal() is None
        assert unsaved._line_within(0) is None
        os.write(writer, b" here \n")
        assert unsaved._line_within(1) == "here"
        os.close(writer)
        with pytest.raises(EOFError):
            unsaved._line_within(1)
