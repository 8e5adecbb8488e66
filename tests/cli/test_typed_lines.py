"""What is typed into a chat, in a real terminal: editing, Tab, and what the next chat offers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mamba_sft.cli import typed_lines
from mamba_sft.cli.typed_lines import KEPT, LONGEST, TypedLines, history_file

TALK = """
import sys
if {without}:
    sys.modules["readline"] = None
from pathlib import Path
from mamba_sft.cli.chat_commands import completions
from mamba_sft.cli.typed_lines import TypedLines
lines = TypedLines(Path({history!r}), completions, print)
while True:
    try:
        text = lines.read("> ")
    except EOFError:
        break
    print("got", ascii(text))
    lines.remember(text)
"""
UP, TAB, CTRL_D = "\x1b[A", "\t", "\x04"
PASTE = "\x1b[200~{}\x1b[201~"


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, code: str):
        self.process, self.screen = pty.fork()
        if self.process == 0:
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, "-c", code])
        self.shown = ""

    def type(self, text: str, until: str) -> str:
        """Types, and returns what is shown from then on until a text appears."""
        begin = len(self.shown)
        os.write(self.screen, text.encode())
        end = time.monotonic() + 60
        while until not in self.shown[begin:] and time.monotonic() < end:
            if select.select([self.screen], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.screen, 65536).decode(errors="replace")
                except OSError:  # it has ended
                    break
        assert until in self.shown[begin:], self.shown
        return self.shown[begin:]

    def enter(self, text: str, got: str) -> None:
        """Types a line, and waits for what the program got of it and for its next prompt."""
        shown = self.type(text + "\r", f"got {got!a}")
        if "> " not in shown.partition(f"got {got!a}")[2]:  # what comes before it is lost to it
            self.type("", "> ")

    def end(self) -> int:
        os.write(self.screen, CTRL_D.encode())
        end = time.monotonic() + 20
        while time.monotonic() < end:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                os.close(self.screen)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.process, signal.SIGKILL)
        raise AssertionError(f"Ctrl-D did not end it: {self.shown}")


def talk(history: Path, *, without: bool = False) -> Terminal:
    terminal = Terminal(TALK.format(history=str(history), without=without))
    terminal.type("", "> ")
    return terminal


def test_lines_come_back_in_the_next_chat_and_nobody_else_reads_them(tmp_path):
    history = tmp_path / "new" / "history.jsonl"
    first = talk(history)
    for line in ("hello", "hello", " a secret", "/save x.jsonl"):
        first.enter(line, line)
    assert first.end() == 0
    assert [json.loads(line) for line in history.read_text().splitlines()] == ["hello", "/save x.jsonl"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    second = talk(history)
    second.enter(UP + UP + " again", "hello again")
    second.enter(PASTE.format("one\ntwo"), "one\ntwo")
    assert second.end() == 0
    third = talk(history)
    third.enter(UP, "one\ntwo")
    assert third.end() == 0


def test_tab_completes_commands_settings_and_paths(tmp_path, monkeypatch):
    (tmp_path / "my chats").mkdir()
    (tmp_path / "my chats" / "of may.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    terminal = talk(tmp_path / "history.jsonl")
    terminal.enter(f"/sa{TAB}my{TAB}of{TAB}", "/save my chats/of may.jsonl")
    terminal.enter(f"/und{TAB}", "/undo")
    terminal.enter(f"/set temp{TAB}0.5", "/set temperature 0.5")
    assert "/set" in terminal.type(f"/s{TAB}{TAB}", "/system")  # the last one that is listed
    terminal.enter(f"\x15plain m{TAB}", "plain m")
    assert terminal.end() == 0


def test_a_python_without_readline(tmp_path):
    terminal = talk(tmp_path / "history.jsonl", without=True)
    terminal.enter("hello", "hello")
    assert terminal.end() == 0
    assert (tmp_path / "history.jsonl").read_text() == '"hello"\n'


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TypedLines]:
    """Lines as if they were typed, without readline."""
    stdin = io.StringIO()
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(typed_lines, "_readline_for", lambda complete: None)

    def make(history: Path | None, told: list[str] | None = None) -> TypedLines:
        return TypedLines(history, lambda line: [], ([] if told is None else told).append)

    return make


def test_where_nothing_can_be_kept_it_is_told_once(tmp_path, typed):
    (tmp_path / "file").write_text("")
    told: list[str] = []
    lines = typed(tmp_path / "file" / "history.jsonl", told)
    lines.remember("hello")
    lines.remember("more")
    assert len(told) == 1
    assert "is not kept" in told[0]
    assert str(tmp_path / "file" / "history.jsonl") in told[0]


def test_no_history_keeps_nothing(tmp_path, typed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed(None).remember("hello")
    assert not list(tmp_path.rglob("*"))


def test_what_is_kept_stays_small_and_private(tmp_path, typed, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "key-1234567890")
    history = tmp_path / "history.jsonl"
    history.write_text("".join(f'"line {i}"\n' for i in range(2 * KEPT + 1)) + '"bro')
    history.chmod(0o644)
    lines = typed(history)
    lines.remember("the key is key-1234567890")
    lines.remember("x" * (LONGEST + 1))
    kept = [json.loads(line) for line in history.read_text().splitlines()]
    assert len(kept) == KEPT + 1
    assert kept[0] == f"line {KEPT + 1}"
    assert kept[-1].startswith("the key is *")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


def test_what_an_editor_left_open_is_closed_whatever_letters_it_has(tmp_path, typed):
    history = tmp_path / "history.jsonl"
    history.write_text('"caf\u00e9"\n"th\u00e9', encoding="utf-8")
    typed(history).remember("tea")
    assert [json.loads(line) for line in history.read_text("utf-8").splitlines()] == ["caf\u00e9", "tea"]


def test_a_pipe_is_read_as_it_is_and_nothing_of_it_kept(tmp_path, monkeypatch):
    read, write = os.pipe()
    os.write(write, b"caf\xe9\nlast")
    os.close(write)
    with open(read, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        lines = TypedLines(tmp_path / "history.jsonl", lambda line: [], print)
        assert not lines.are_typed
        assert lines.history is None
        found = []
        with contextlib.suppress(EOFError):
            while True:
                found.append(lines.read("> "))
                lines.remember(found[-1])
    assert found == ["caf\udce9", "last"]
    assert not list(tmp_path.iterdir())


def test_it_lies_in_the_cache_that_the_environment_names(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBA_SFT_CACHE", str(tmp_path))
    assert history_file() == tmp_path / "chat-history.jsonl"
