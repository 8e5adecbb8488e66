"""What others wrote reaches a terminal in one printable form, by whichever way it comes."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from mamba_sft.cli import app as app_module
from mamba_sft.cli import console
from mamba_sft.cli import train as train_module
from mamba_sft.cli.app import app
from mamba_sft.cli.console import loading, write_json
from mamba_sft.cli.lines import WarningList, WholeLine
from mamba_sft.cli.printable import ConsoleHandler, PrintableConsole, PrintableFormatter, printable
from mamba_sft.errors import DataError, MambaSFTError, ModelError
from mamba_sft.evaluation.prompts import Prompt, Sample, write_samples
from mamba_sft.model.checkpoint import read_config, read_tensors
from mamba_sft.run import Run

ODD = "a\x1b[31m\x9b2J\u202e[bold]:bomb:\udcff\x07"
SHOWN = r"a\x1b[31m\x9b2J\u202e[bold]:bomb:\udcff\x07"


def printed(renderable: RenderableType, width: int = 200, **how: Any) -> str:
    file = io.StringIO()
    console = PrintableConsole(file=file, width=width, force_terminal=True, color_system=None)
    console.print(renderable, **how)
    return file.getvalue()


def is_harmless(text: str) -> bool:
    return all(character == "\n" or printable(character) == character for character in text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x00\x08\x0b\x0c\x7f", r"\x00\x08\x0b\x0c\x7f"),
        ("\x85\x90\x9b\x9d", r"\x85\x90\x9b\x9d"),
        ("\u202a\u202e\u2066\u2069\u2028\ufeff", r"\u202a\u202e\u2066\u2069\u2028\ufeff"),
        ("\ud800\udcff", r"\ud800\udcff"),
        ("one\r\ntwo\rthree\tfour\n", "one\ntwo\\rthree\tfour\n"),
        ("Grüße, 世界 🤷🏽‍♀️ שלום\u200f", "Grüße, 世界 🤷🏽‍♀️ שלום\u200f"),
    ],
)
def test_the_form(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "renderable",
    [
        ODD,
        Text(ODD.replace("\x07", r"\x07")),  # rich itself drops a bell from a `Text`
        Text.assemble("a", (ODD[1:3], "bold"), (ODD[3:-1], "red"), r"\x07"),
        Group(ODD),
        Padding(ODD, (0, 0, 0, 2)),
        Panel(ODD),
        WholeLine(ODD),
        WarningList([ODD]),
    ],
)
def test_the_console_shows_it_whatever_it_is_in(renderable: RenderableType) -> None:
    out = printed(renderable)
    assert SHOWN in out
    assert is_harmless(out)


def test_a_table_breaks_what_it_shows_and_loses_none_of_it() -> None:
    table = Table(title=ODD)
    table.add_column("x", overflow="fold")
    table.add_row("\x1b" * 20)
    out = printed(table, width=30)
    assert is_harmless(out)
    cells = [line.strip("│ ") for line in out.splitlines() if line.startswith("│")]
    assert "".join(cells) == r"\x1b" * 20


def test_styles_stay_where_they_were() -> None:
    console = PrintableConsole(file=io.StringIO(), width=80)
    segments = list(console.render(Text.assemble("one\x1b", ("two\x1b", "bold"), "three")))
    bold = [segment.text for segment in segments if segment.style and segment.style.bold]
    assert "".join(bold) == r"two\x1b"
    assert "".join(segment.text for segment in segments) == "one\\x1btwo\\x1bthree\n"


@given(st.text())
def test_nothing_else_gets_through(text: str) -> None:
    table = Table(box=None)
    table.add_row(text)
    for renderable in (text, Text(text), table):
        assert is_harmless(printed(renderable, width=20))
    assert is_harmless(printable(text).replace("\t", ""))


def test_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("mamba_sft", logging.INFO, "x.py", 1, "`%s` is read", (ODD,), None)
    assert PrintableFormatter("%(message)s").format(record) == f"`{SHOWN}` is read"
    logger = logging.getLogger("mamba_sft")
    before = logger.handlers, logger.propagate, logger.level
    try:
        app_module.options(version=False, verbose=True)
        logger.info("`%s` is read", ODD)
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])
    assert capsys.readouterr().err == f"`{SHOWN}` is read\n"


def message_of(error: MambaSFTError, capsys: pytest.CaptureFixture[str]) -> str:
    app_module._print_error(error)
    return capsys.readouterr().err


def test_an_error_and_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    shown = message_of(DataError(f"no `{ODD}`\nsecond line", hint=f"rename `{ODD}`"), capsys)
    assert shown == f"error: no `{SHOWN}`\nsecond line\nhint: rename `{SHOWN}`\n"


def test_a_model_type_and_the_name_of_a_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": ODD}))
    with pytest.raises(ModelError) as found:
        read_config(tmp_path)
    assert SHOWN in (shown := message_of(found.value, capsys))
    assert is_harmless(shown)
    shard = ODD[:-2] + ".safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ModelError) as found:
        read_tensors(tmp_path)
    assert is_harmless(message_of(found.value, capsys))


def test_words_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for word in (f"train.{ODD[:-2]}=1", f"model.base={ODD[:-2]}", ODD[:-2]):
        monkeypatch.setattr("sys.argv", ["mamba-sft", "train", "quickstart", word])
        with pytest.raises(SystemExit) as ended:
            app_module.main()
        assert ended.value.code in (1, 2)
        shown = capsys.readouterr().err
        assert r"\x1b[31m" in shown
        assert is_harmless(shown)


def test_prompts_and_answers_in_the_table_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    text = ODD.replace("\udcff", "")
    write_samples(run.samples_file, [Sample(Prompt(text, "x", None), text, text)])
    file = io.StringIO()
    console = PrintableConsole(file=file, width=200, force_terminal=True, color_system=None)
    monkeypatch.setattr(train_module, "err", console)
    monkeypatch.setattr("mamba_sft.evaluation.run_figures.sample_titles", lambda run: ("before", "after"))
    train_module._show_samples(run, fits_no_chat=True)
    assert file.getvalue().count(SHOWN.replace(r"\udcff", "")) == 3
    assert is_harmless(file.getvalue())


def test_names_of_files_and_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "chats\x1b[31m\u202e.jsonl"
    Path(name).write_text(json.dumps({"\x9bcolumn": "x", "[bold]": "y"}) + "\n")
    base = {"base": "quickstart/base"}
    recipe = {"output_dir": "run", "model": base, "data": {"sources": [{"path": name}]}}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    found = CliRunner().invoke(app, ["data", "recipe.yaml"])
    assert isinstance(found.exception, MambaSFTError), found.output


def test_json_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"path": ODD, "ü": "\u2028"})
    shown = capsys.readouterr().out
    assert is_harmless(shown)
    assert '"ü"' in shown
    assert json.loads(shown) == {"path": ODD, "ü": "\u2028"}


def test_a_line_that_goes_again_leaves_the_cursor_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A carriage return printed as text would be shown as one, and the next message begin behind it."""
    file = io.StringIO()
    terminal = PrintableConsole(file=file, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "err", terminal)
    with loading("torch"):
        pass
    assert file.getvalue() == "loading torch ...\r\x1b[2K"


def test_a_log_line_stands_above_what_is_drawn() -> None:
    file = io.StringIO()
    console = PrintableConsole(file=file, width=60, force_terminal=True, color_system=None)
    handler = ConsoleHandler(console)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    record = logging.LogRecord("mamba_sft", logging.INFO, "", 0, "read %s", (ODD,), None)
    with console.status("planning"):
        handler.handle(record)
    assert on_screen(file.getvalue()) == [f"read {SHOWN}"]


def on_screen(text: str) -> list[str]:
    """What is on a terminal's screen after `text`, of which only lines that are erased go."""
    lines: list[str] = []
    line = ""
    for piece in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", text):
        if piece == "\n":
            lines.append(line)
            line = ""
        elif piece == "\x1b[2K":
            line = ""
        elif piece == "\x1b[1A":
            line = lines.pop()
        elif not piece.startswith("\x1b") and piece != "\r":
            line += piece
    return [shown for shown in [*lines, line] if shown]


def test_a_terminal_without_utf8_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["mamba-sft", "--version"])
    with pytest.raises(SystemExit) as stop:
        app_module.main()
    assert stop.value.code == 0
    console.out.print("\u27e6caf\xe9")
    sys.stdout.flush()
    assert written.getvalue().endswith(b"\\u27e6caf\\xe9\n")
