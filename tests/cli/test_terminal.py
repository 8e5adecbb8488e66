from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from mamba_sft.cli import terminal as terminal_module
from mamba_sft.cli.chat_commands import COMMANDS, command_in, completions, obey
from mamba_sft.cli.columns import Columns
from mamba_sft.cli.terminal import chat_loop
from mamba_sft.errors import UsageError
from mamba_sft.inference.answering import open_session
from mamba_sft.inference.repetition import ENOUGH
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


def chat(
    session: Any, *lines: str | BaseException, terminal: bool = True, width: int = 100, **how: Any
) -> str:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=terminal, width=width, height=30, color_system=None, legacy_windows=False
    )
    chat_loop(session, console, lines_of(*lines), **how)
    return out.getvalue()


@pytest.fixture(autouse=True)
def no_answer_is_just_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the prompt is not taken for one that came too late."""
    monkeypatch.setattr(terminal_module, "LATE", -1.0)


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
    assert "read" in out
    assert "in all" in out
    assert "cut off" in out
    assert "took back: hello" in out
    assert "there is nothing to take back" in out
    assert "no command `/nope`" in out
    assert all(name in out for name in COMMANDS)
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


def interrupting(chat_model: Any, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C at one call of the model."""
    original = chat_model.model.forward
    calls = [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(chat_model.model, "forward", interrupted)


def test_ctrl_c_ends_the_answer_and_at_the_prompt_the_chat(chat_model, monkeypatch):
    session = ChatSession(chat_model, sampling=Sampling(50))
    interrupting(chat_model, monkeypatch, 8)
    out = chat(session, "hello", "again", KeyboardInterrupt(), "never read")
    assert "interrupted" in out
    assert "50 tokens" in out
    assert "never" not in out
    users = [turn["content"] for turn in session.messages if turn["role"] == "user"]
    assert users == ["hello", "again"]


def test_ctrl_c_that_comes_too_late_for_an_answer_leaves_nothing(chat_model, monkeypatch):
    monkeypatch.setattr(terminal_module, "LATE", 60.0)
    session = ChatSession(chat_model, sampling=SHORT)
    out = chat(session, "hello", KeyboardInterrupt(), "again")
    assert "the answer had ended" in out
    assert len(session.messages) == 5


def test_ctrl_c_takes_back_a_block(chat_model):
    session = ChatSession(chat_model, sampling=SHORT)
    chat(session, '"""', "never sent", KeyboardInterrupt(), "hello")
    assert [m["content"] for m in session.messages if m["role"] == "user"] == ["hello"]


def test_ctrl_c_ends_a_pipe(chat_model, monkeypatch):
    interrupting(chat_model, monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        chat(ChatSession(chat_model, sampling=Sampling(50)), "hello", "again", terminal=False)
    with pytest.raises(KeyboardInterrupt):
        chat(ChatSession(chat_model, sampling=SHORT), KeyboardInterrupt(), terminal=False)


def test_ctrl_c_in_the_first_of_two_answers_goes_on_with_the_other(chat_model, monkeypatch):
    compared = open_session(chat_model, compare=True, sampling=Sampling(30))
    interrupting(chat_model, monkeypatch, 14)
    out = chat(compared, "hello", width=80)
    assert "interrupted" in out
    assert [len(side.messages) for side in compared.sides] == [3, 3]
    assert compared.sides[1].last_turn.tokens == 30


def test_what_a_model_writes_cannot_steer_the_terminal(chat_model, monkeypatch):
    session = ChatSession(chat_model, sampling=SHORT)
    monkeypatch.setattr(
        session, "_answer", lambda text: (piece for piece in ("\x1b", "[2Jred", "\a [b]x[/b]\r\n"))
    )
    out = chat(session, "hello")
    assert "\x1b[2J" not in out
    assert "\a" not in out
    assert "\\x1b[2Jred\\x07 [b]x[/b]\n" in out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_two_answers_the_tuned_one_first(chat_model, width):
    compared = open_session(chat_model, compare=True, sampling=SHORT)
    out = chat(compared, "hello", "/quit", width=width)
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", out).split("\n")]
    assert out.count("12 tokens") == 2
    if width >= terminal_module.WIDE_ENOUGH:
        assert any(line.split() == ["tuned", "base"] for line in lines)
    else:
        assert lines.index("tuned") < lines.index("base")


def test_two_answers_in_a_pipe(chat_model):
    compared = open_session(chat_model, compare=True, sampling=SHORT)
    tuned, base = chat(compared, "hello", terminal=False).split("base: ")
    assert tuned == f"tuned: {compared.sides[0].messages[-1]['content']}\n"
    assert base == f"{compared.sides[1].messages[-1]['content']}\n"


@pytest.mark.parametrize("width", [80, 120])
def test_a_base_that_goes_round_is_stopped_and_said(chat_model, monkeypatch, width):
    compared = open_session(chat_model, compare=True, sampling=Sampling(400))
    compared.sides[0].sampling = SHORT
    monkeypatch.setattr(compared.sides[1], "_written", lambda sampling: iter([300] * 400))
    out = chat(compared, "hello", width=width)
    assert out.count("[repeats itself; stopped]") == 1
    assert compared.sides[1].last_turn.finish_reason == "repetition"
    assert compared.sides[1].last_turn.tokens == ENOUGH
    assert compared.sides[0].last_turn.finish_reason == "length"
    compared.reset()
    assert "[repeats itself; stopped]\n" in chat(compared, "hello", terminal=False)


def test_one_model_may_repeat_itself_and_that_is_said(chat_model, monkeypatch):
    session = ChatSession(chat_model, sampling=Sampling(400))
    monkeypatch.setattr(session, "_written", lambda sampling: iter([300] * 400))
    out = chat(session, "hello")
    assert "400 tokens" in out
    assert "it repeats itself" in " ".join(out.split())
    assert session.last_turn.finish_reason == "length"


def test_columns_show_the_end_of_texts_longer_than_the_screen():
    columns = Columns(["base", "tuned"])
    columns.read(1, 2048, 5000)
    console = Console(file=io.StringIO(), width=80, height=20, color_system=None)
    console.print(columns)
    columns.texts = ["\n".join(f"left {i}" for i in range(100)), "right [bold]\x1b[2J"]
    assert "reading 5,000 tokens, 2,048 done" in console.file.getvalue()  # type: ignore[attr-defined]
    console.file.truncate(0)  # type: ignore[attr-defined]
    console.print(columns)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(out.splitlines()) <= 20
    assert "left 99" in out
    assert "left 50" not in out
    assert "right [bold]\\x1b[2J" in out
    columns.end(["a note", "another"])
    console.print(columns)
    assert "left 50" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "a note" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("/sav", "/save"), ("/quite", "/quit"), ("/sytem x", "/system"), ("/rest", "/reset"),
        ("/temperature 0.7", "/set temperature"), ("/top_k", "/set top_k"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_told_what_was_meant(line, meant):
    with pytest.raises(UsageError, match="no command") as caught:
        command_in(line)
    assert f"did you mean `{meant}`?" in str(caught.value)


@pytest.mark.parametrize("line", ["/etc/hosts", " /reset", "/", "// x", "1/2", "", "/2"])
def test_what_is_a_message(line):
    assert command_in(line) is None


def test_what_is_a_command():
    assert command_in("/quit") == ("/exit", "")
    assert command_in("/RESET ") == ("/reset", "")
    assert command_in("/system be\nbrief") == ("/system", "be\nbrief")
    with pytest.raises(UsageError, match="`/reset` takes nothing, not `the clock`"):
        command_in("/reset the clock")


def test_settings_change_how_answers_are_chosen(chat_model):
    session = ChatSession(chat_model, sampling=SHORT)
    assert obey(session, command_in("/set temperature=0.7")) == "temperature 0.7"
    assert obey(session, command_in("/set max-new-tokens 5")) == "max_new_tokens 5"
    assert obey(session, command_in("/set seed 3")) == "seed 3"
    assert obey(session, command_in("/set seed none")) == "seed None"
    assert (session.sampling.temperature, session.sampling.max_new_tokens) == (0.7, 5)
    assert "temperature 0.7 · " in obey(session, command_in("/set"))
    for line, message in {
        "/set temprature 1": "did you mean `temperature`?",
        "/set temperature warm": "`temperature` is a number, not `warm`",
        "/set top_k 0.5": "`top_k` is a whole number, not `0.5`",
        "/set top_p 7": "`top_p` must be",
    }.items():
        with pytest.raises(UsageError) as caught:
            obey(session, command_in(line))
        assert message in str(caught.value)
    compared = open_session(chat_model, compare=True)
    obey(compared, command_in("/set temperature 0.7"))
    assert [side.sampling.temperature for side in compared.sides] == [0.7, 0.7]


def test_no_system_message_and_the_same_answer_are_said(chat_model):
    session = ChatSession(chat_model, sampling=SHORT)
    out = chat(session, "/system none", "hello", "/retry", "/system be odd", "hello", "hello")
    assert "system message: none\n" in out
    assert "the answer will be the same: `temperature` is 0" in out
    assert "system message: be odd; the next message reads the conversation again" in out
    assert " ".join(out.split()).count("the conversation was read again from the start") == 1


def test_a_conversation_is_gone_on_with(chat_model, tmp_path):
    session = ChatSession(chat_model, sampling=SHORT)
    chat(session, "hello", f"/save {tmp_path / 'a.jsonl'}", "/reset", f"/load {tmp_path / 'a.jsonl'}")
    assert [turn["role"] for turn in session.messages] == ["system", "user", "assistant"]
    told = chat(session, f"/load {tmp_path / 'b.jsonl'}")  # wrapped at a blank
    assert "no such file" in " ".join(told.lower().split())


def test_a_long_message_shows_that_it_is_read(chat_model):
    session = ChatSession(chat_model, sampling=Sampling(2))
    out = chat(session, "hello " * 3000)
    assert "reading " in out
    assert "done ..." in out
    assert "reading" not in chat(session, "hello")


def test_a_person_at_neither_end_gets_no_prompts_but_no_control_characters(chat_model, monkeypatch):
    session = ChatSession(chat_model, sampling=SHORT)
    monkeypatch.setattr(session, "_answer", lambda text: (piece for piece in ("\x1b[2J", "red")))
    assert chat(session, "hello", talks=False) == "\\x1b[2Jred\n"


def test_a_block_at_the_end_of_a_pipe_is_a_message(chat_model):
    session = ChatSession(chat_model, sampling=SHORT)
    chat(session, '"""', "/reset", "two", terminal=False)
    assert session.messages[1]["content"] == "/reset\ntwo"


def test_what_is_sent_is_remembered_and_help_says_where(chat_model):
    kept: list[str] = []
    session = ChatSession(chat_model, sampling=SHORT)
    out = chat(session, '"""', "one", "two", '"""', "", "/help", remember=kept.append, history="~/lines")
    assert kept == ["one\ntwo", "/help"]
    assert "~/lines keeps what you type" in " ".join(out.split())


def test_what_tab_completes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats").mkdir()
    assert completions("/s") == ["/system ", "/set ", "/save "]
    assert completions("/set to") == ["/set top_p ", "/set top_k "]
    assert completions("/save ch") == ["/save chats/"]
    assert completions("/reset x") == completions("hello") == []
