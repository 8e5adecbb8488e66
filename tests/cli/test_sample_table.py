"""The table of answers after training says which are right, and shows the wrong ones first."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest

from mamba_sft.cli import train as train_module
from mamba_sft.cli.printable import PrintableConsole
from mamba_sft.evaluation.prompts import Prompt, Sample, write_samples
from mamba_sft.run import Run


def shown(run: Run, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of the table that hold words, without its frame."""
    write_samples(run.samples_file, samples)
    file = io.StringIO()
    monkeypatch.setattr(train_module, "err", PrintableConsole(file=file, width=120, color_system=None))
    train_module._show_samples(run, fits_no_chat=False)
    cells = ([cell.strip() for cell in line.strip("│┃ \n").replace("┃", "│").split("│")] for line in
             file.getvalue().splitlines())  # fmt: skip
    return [" | ".join(row) for row in cells if any(any(c.isalnum() for c in cell) for cell in row)]


def test_the_wrong_ones_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = [Sample(Prompt(f"r{n}", "in"), "out", "in") for n in range(8)]
    others = [Sample(Prompt("open"), "a", "b"), Sample(Prompt("wrong", "in"), "in", "out")]
    lines = shown(Run(tmp_path), [*right, *others], monkeypatch)
    assert lines == [
        "sample answers: 6 of 10 shown",
        "prompt | expected | base | tuned",
        "wrong | in | ✓ in | ✗ out",
        "open |  | a | b",
        *(f"r{n} | in | ✗ out | ✓ in" for n in range(4)),
    ]


@pytest.mark.parametrize(("wrong", "right", "seen"), [(7, 200, "wwwrrr"), (9, 2, "wwwwrr"), (9, 0, "wwwwww")])
def test_right_ones_are_in_sight_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int, right: int, seen: str
) -> None:
    samples = [Sample(Prompt("w", "in"), "in", "out")] * wrong + [
        Sample(Prompt("r", "in"), "in", "in")
    ] * right
    lines = shown(Run(tmp_path), samples, monkeypatch)
    assert "".join(line[0] for line in lines[2:]) == seen


def test_without_expected_answers_nothing_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(Run(tmp_path), [Sample(Prompt("p"), "a", "b")], monkeypatch)
    assert lines == ["sample answers: 1 prompt", "prompt | base | tuned", "p | a | b"]


def test_no_samples_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(Run(tmp_path), [], monkeypatch) == []


def test_the_commands_behind_a_run_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "my run")
    train_module._show_end(run, "merge")
    *_, told = capsys.readouterr().out.splitlines()
    chat, merge = told.removeprefix("next:").split("   or   ")
    assert shlex.split(chat) == ["mamba-sft", "chat", str(run.path)]
    assert shlex.split(merge) == ["mamba-sft", "merge", str(run.path)]
