"""`plan --plot`: what is drawn is what the steps have, in 80 columns of characters of any terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.cli.plan_plot import HEIGHT, WIDTH, terminal_plot
from mamba_sft.errors import UsageError
from mamba_sft.planning.curves import Curves

HUB = "output_dir: x\nmodel: {base: tiiuae/falcon-mamba-7b}\ndata: {sources: [{path: some/chats}]}\n"
RAMP = "train.batch_ramp={from: 4, to: 16, tokens: 100k tokens}"


def curves(rates: Any, sizes: Any, length: int = 10) -> Curves:
    sizes = np.array(sizes)
    return Curves(np.array(rates, dtype=np.float64), sizes, sizes * length, estimated=False)


def panels(lines: list[str]) -> list[list[str]]:
    """The drawn rows of each panel, from the top, without the marks."""
    rows = [line.partition("|")[2].ljust(WIDTH - 11) for line in lines if "|" in line]
    return [rows[start : start + HEIGHT] for start in range(0, len(rows), HEIGHT)]


@pytest.fixture
def hub(tmp_path: Path) -> str:
    path = tmp_path / "hub.yaml"
    path.write_text(HUB)
    return str(path)


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words, "--card", "h100"])


def refusal(*words: str) -> UsageError:
    error = invoke(*words).exception
    assert isinstance(error, UsageError)
    return error


def test_lines_are_80_plain_characters() -> None:
    lines = list(terminal_plot(curves(np.linspace(1, 1e-9, 999), np.arange(1, 1000))))
    assert all(line.isascii() and len(line) <= 80 for line in lines)
    assert len(panels(lines)) == 3


def test_each_column_stands_at_its_value() -> None:
    falling = [1.0, 0.5, 0.01, 0.3]
    rate, batch, length = panels(list(terminal_plot(curves(falling, [10, 10, 10, 10]))))
    heights = [
        {HEIGHT - 1 - row for row in range(HEIGHT) if rate[row][column] == "*"} for column in range(69)
    ]
    assert (heights[0], heights[20], heights[40], heights[68]) == ({6}, {3}, {0}, {2})
    jumps = [column for column in range(69) if len(heights[column]) > 1]
    assert jumps == [17, 34, 51], "a jump is a line"
    for flat in (batch, length):
        assert set(flat[0]) == {"*"}
        assert {character for row in flat[1:] for character in row} == {" "}


def test_columns_are_tokens_not_steps() -> None:
    _, batch, _ = panels(list(terminal_plot(curves([1, 1], [10, 90]))))
    assert batch[0].index("*") == 6, "the small step has a tenth of the tokens"


def test_the_last_step_is_drawn() -> None:
    rate, _, _ = panels(list(terminal_plot(curves([1.0] * 500 + [0.001], [10] * 501))))
    assert rate[HEIGHT - 1][-1] == "*"
    assert rate[0][0] == "*"
    assert list(terminal_plot(curves([0.5], [3])))


def test_the_plot_of_a_recipe_on_the_hub_is_estimated(hub: str) -> None:
    shown = invoke(hub, "train.max_steps=40", "data.max_length=1000", RAMP, "--plot")
    assert shown.exit_code == 0, shown.output
    read = 0
    for _ in range(40):
        read += 1000 * int(4 + 12 * min(1, read / 100_000) + 0.5)
    assert f"40 steps over {read // 1000}k tokens, estimated with rows of `data.max_length`" in shown.stdout
    assert "global batch, rows: first 4, most 16, last 16" in shown.stdout
    assert "up to 16,000 a step" in shown.stdout


def test_without_rows_and_steps_it_says_what_is_needed(hub: str) -> None:
    error = refusal(hub, "--plot")
    assert error.message.endswith("so there are no rows to plot the steps of")
    assert "`train.max_steps=1000`" in str(error.hint)
    both = refusal(hub, "data.max_length=null", "data.packing=false", "train.stream_tokens=512", "--plot")
    assert "`train.max_steps=1000 data.max_length=2048`" in str(both.hint)
    assert invoke(hub).exit_code == 0, "the rest of the plan needs neither"


def test_json_has_a_value_for_every_step(hub: str) -> None:
    words = (hub, "train.max_steps=40", "data.max_length=1000", RAMP, "train.batch_scaling=true")
    found = json.loads(invoke(*words, "--plot", "--json").stdout)["curves"]
    assert {len(found[name]) for name in ("learning_rate", "batch_size", "tokens", "row_length")} == {40}
    assert found["batch_size"][:3] == [4, 4, 5]
    assert found["estimated"] is True
    assert found["learning_rate"][2] == pytest.approx(2e-4 * (5 / 16) ** 0.5)
    assert "curves" not in json.loads(invoke(*words, "--json").stdout)


def test_the_rows_of_this_machine_are_planned_as_they_are_trained(recipe: Any, tmp_path: Path) -> None:
    made = recipe(
        "train.max_steps=-1", "train.num_train_epochs=2", "data.packing=false",
        "train.gradient_accumulation_steps=null", "train.batch_ramp={from: 2, to: 7, tokens: 600}",
    )  # fmt: skip
    path = tmp_path / "here.yaml"
    path.write_text(made.to_yaml())
    shown = CliRunner().invoke(app, ["plan", str(path), "--plot", "--json"])
    assert shown.exit_code == 0, shown.output
    content = json.loads(shown.stdout)
    found = content["curves"]
    assert found["estimated"] is False
    assert sum(found["batch_size"]) == 2 * 48
    assert (content["steps"], content["most_tokens"]) == (len(found["tokens"]), sum(found["tokens"]))
    assert content["gradient_accumulation_steps"] is None
    assert len(set(found["row_length"])) > 1


def test_a_file_gets_the_panels_as_svg(hub: str, tmp_path: Path) -> None:
    file = tmp_path / "plot.svg"
    shown = invoke(hub, "train.max_steps=40", RAMP, "--plot-file", str(file))
    assert shown.exit_code == 0, shown.output
    root = ElementTree.parse(file).getroot()
    space = "{http://www.w3.org/2000/svg}"
    inner = root.findall(f"{space}svg")
    assert [panel.get("y") for panel in inner] == ["0", "200", "400"]
    assert [panel.get("aria-label") for panel in inner] == [
        "learning rate over tokens",
        "global batch, rows over tokens",
        "row length, tokens in the mean over tokens",
    ]
    drawn = inner[1].find(f"{space}path[@class='c1']")
    assert drawn is not None
    assert len(re.findall("[ML]", drawn.get("d", ""))) == 80, "each step is level"


def test_a_file_that_would_be_something_else_is_refused(hub: str, tmp_path: Path) -> None:
    for name, words in (
        ("plot.png", "`--plot-file` writes SVG"),
        ("nowhere/plot.svg", "has no directory"),
        (".", "writes SVG"),
    ):
        assert words in refusal(hub, "train.max_steps=4", "--plot-file", str(tmp_path / name)).message
    (tmp_path / "dir.svg").mkdir()
    error = refusal(hub, "train.max_steps=4", "--plot-file", str(tmp_path / "dir.svg"))
    assert "is a directory" in error.message


def test_it_is_text_in_a_pipe_whatever_the_terminal(hub: str) -> None:
    command = [sys.executable, "-m", "mamba_sft", "plan", hub, "train.max_steps=9", "--card", "t4", "--plot"]
    plain = {"NO_COLOR": "1", "COLUMNS": "40", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | plain, timeout=120
    )
    assert "\x1b" not in done.stdout
    drawn = [line for line in done.stdout.splitlines() if "*" in line]
    assert max(map(len, drawn)) == 80
