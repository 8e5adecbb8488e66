"""Names of files and fields to paste stay whole, at any width; everything else wraps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.cli.lines import WarningList, WholeLine

FIELDS = "train.gradient_accumulation_steps=1 train.num_train_epochs=20 train.per_device_train_batch_size=1"


def printed(renderable: RenderableType, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable, crop=False)
    return console.export_text().splitlines()


def test_a_line_stays_one_line() -> None:
    path = "data/" + "long name " * 20 + ".jsonl"
    assert printed(WholeLine(path, indent=2), 30) == ["  " + path]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_warning_wraps_and_its_fields_do_not(width: int) -> None:
    lines = printed(WarningList([f"{'word ' * 40}\n{FIELDS}", "short"], indent=2), width)
    assert lines[-1] == "  ! short"
    assert lines[-2] == "    " + FIELDS
    assert " ".join(line.strip(" !") for line in lines[:-2]).split() == ["word"] * 40
    assert max(map(len, lines[:-2])) <= max(width, 24)


def test_a_name_between_backticks_is_one_word() -> None:
    lines = printed(WarningList(["`columns` of `my own/chats and more.jsonl`: none has `reply`"]), 30)
    assert any("`my own/chats and more.jsonl`:" in line for line in lines)


def unbroken(output: str, name: str) -> bool:
    """Whether `name` is whole wherever it begins."""
    return output.count(name) == len(re.findall(re.escape(name[: len(name) // 2]), output)) > 0


@pytest.mark.parametrize("length", [10, 60, 120])
@pytest.mark.parametrize("verb", [("data",), ("train", "--dry-run")])
def test_no_file_name_wraps_at_80_columns(
    recipe: Any, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Any, length: int
) -> None:
    monkeypatch.setattr("mamba_sft.cli.console.out._width", 80, raising=False)
    monkeypatch.setattr("mamba_sft.cli.console.err._width", 80, raising=False)
    name = ("x" * length) + ".jsonl"
    monkeypatch.chdir(tmp_path)
    chats.rename(tmp_path / name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(f"data.sources.0.path={name}").to_yaml())
    shown = CliRunner().invoke(app, [*verb, str(path)])
    assert shown.exit_code == 0, shown.output
    assert unbroken(shown.output, name)
    for line in shown.output.splitlines():
        assert len(line) <= 80 or name in line or "all is well" in line, line


def test_packed_rows_and_rows_are_told_apart(recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe().to_yaml())
    shown = CliRunner().invoke(app, ["data", str(path)]).stdout
    packed = json.loads(CliRunner().invoke(app, ["data", str(path), "--json"]).stdout)["packed"]["rows"]
    assert packed < 48
    assert f"48 rows packed into {packed} of 96 tokens" in shown
    assert "2 micro-batches of 2 packed rows" in shown
    dry = CliRunner().invoke(app, ["train", str(path), "--dry-run"]).output
    assert f"48 rows to train on, packed into {packed}; 4 steps; all is well" in dry
    plain = CliRunner().invoke(app, ["data", str(path), "data.packing=false"]).stdout
    assert "2 micro-batches of 2 rows" in plain
    ramp = ("train.gradient_accumulation_steps=null", "train.batch_ramp={from: 2, to: 7, tokens: 300}")
    growing = CliRunner().invoke(app, ["data", str(path), "data.packing=false", *ramp]).stdout
    assert "2 to 7 rows, by train.batch_ramp" in growing
    assert "packed into" not in plain
    assert "packed rows" not in plain


def test_the_quickstart_s_own_data_draws_no_warning() -> None:
    shown = CliRunner().invoke(app, ["data", "quickstart", "--rows", "0"])
    assert shown.exit_code == 0, shown.output
    assert "worth a look" not in shown.output
    assert "repeated rows" in shown.output
    assert json.loads(CliRunner().invoke(app, ["data", "quickstart", "--json"]).stdout)["warnings"] == []
