"""Every mistake of the table: no traceback, its exit code, a message that says it, a hint that works."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mamba_sft.cli import app
from mamba_sft.run import Run
from tests.cli import provoked_errors
from tests.cli.provoked_by_files import FILE_ERRORS, FILE_MENDED, FILE_SHELL, prepare_files
from tests.cli.provoked_by_words import WORD_ERRORS, WORD_MENDED, WORD_SHELL

ERRORS = provoked_errors.ERRORS | FILE_ERRORS | WORD_ERRORS
MENDED = provoked_errors.MENDED | FILE_MENDED | WORD_MENDED
SHELL = provoked_errors.SHELL | FILE_SHELL | WORD_SHELL


class Outcome(NamedTuple):
    code: int
    said: str


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, run: Run, base: Path) -> Path:
    path = tmp_path_factory.mktemp("mistakes")
    provoked_errors.prepare(path, run, base)
    prepare_files(path)
    return path


@pytest.fixture
def place(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(filled)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return filled


def typed(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Outcome:
    """Runs a command in this process; a bug's traceback comes through."""
    monkeypatch.setattr(sys, "argv", ["mamba-sft", *shlex.split(command)])
    capsys.readouterr()
    try:
        app.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return Outcome(code, capsys.readouterr().err)


@pytest.mark.parametrize("name", ERRORS)
def test_it_is_told(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ERRORS[name]
    before = everything(place)
    code, said = typed(error.command, monkeypatch, capsys)
    message, _, hint = said.partition("hint: ")
    assert code == error.code, said
    assert error.says in " ".join(message.split())
    assert error.hint in " ".join(hint.split())
    assert len(re.findall("^(error|Error): ", said, flags=re.MULTILINE)) == 1
    assert everything(place) == before, "a mistake leaves nothing behind"


def everything(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


def test_there_are_a_hundred_and_each_says_something() -> None:
    assert len(ERRORS) == sum(map(len, (provoked_errors.ERRORS, FILE_ERRORS, WORD_ERRORS))), "a name twice"
    assert len(ERRORS) >= 240
    assert len({error.command for error in ERRORS.values()}) == len(ERRORS)
    assert all(error.says for error in ERRORS.values())
    verbs = {error.command.split()[0] for error in ERRORS.values()}
    assert {"train", "data", "plan", "merge", "export", "chat", "generate", "report", "recipes"} <= verbs


def commands_in(hint: str) -> Iterator[str]:
    """The commands of ours that a hint has, to be pasted as they are."""
    for command in re.findall(r"`mamba-sft ([^`]+)`|for example: mamba-sft (.*)", hint):
        words = "".join(command)
        to_fill_in = re.search(r"\b[A-Z]{3,}\b", words)  # RECIPE, NAME
        if not to_fill_in and words not in ("train", "doctor"):  # a verb's name; what has tests of its own
            yield words


PASTED = sorted({command for error in ERRORS.values() for command in commands_in(error.hint)})


@pytest.mark.parametrize("command", PASTED)
def test_a_command_of_a_hint_is_taken(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rehearsed = f"{command} --dry-run" if command.startswith(("train", "export")) else command
    code, said = typed(rehearsed, monkeypatch, capsys)
    away = "needs the hub" if "instruct-qlora" in command else ""
    assert code == 0 or (away and code == 1 and "hint: " in said), said
    shutil.rmtree(place / "runs" / "tiny" / "merged", ignore_errors=True)


@pytest.mark.parametrize("name", MENDED)
def test_what_a_hint_says_mends_it(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, quoted = MENDED[name]
    assert quoted in typed(ERRORS[name].command, monkeypatch, capsys).said, "it is the message that says so"
    code, said = typed(command, monkeypatch, capsys)
    assert code == 0, said


@pytest.mark.parametrize("name", SHELL)
def test_a_shell_takes_what_a_hint_says(
    name: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, written, verb = SHELL[name]
    _, said = typed(ERRORS[name].command, monkeypatch, capsys)
    [line] = re.findall(r"(?:hint: |: )((?:iconv|mv|python) .*)", said)
    assert line.startswith(command)
    for file in place.glob("*.*"):
        if file.is_file():
            shutil.copy(file, tmp_path)
    shutil.copytree(place / "tiny-base", tmp_path / "tiny-base")
    monkeypatch.chdir(tmp_path)
    shell = line.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    subprocess.run(shell, shell=True, check=True)
    code, said = typed(verb.format(written), monkeypatch, capsys)
    assert code == 0, said


@pytest.mark.parametrize("name", ["recipe: none of that name", "chat: no such model", "no such verb"])
def test_a_process_of_its_own_says_the_same(name: str, place: Path) -> None:
    error = ERRORS[name]
    done = subprocess.run(
        [sys.executable, "-m", "mamba_sft", *shlex.split(error.command)],
        check=False, capture_output=True, text=True, cwd=place,
    )  # fmt: skip
    assert done.returncode == error.code
    assert error.says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
