"""Rows to optimizer steps: what is chosen for small data sets, what is warned of, and that the fix works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft import Recipe
from mamba_sft.cli.app import app
from mamba_sft.planning.extent import RunLength, run_length, with_accumulation

TEXT = "output_dir: x\nmodel: {base: b}\ndata: {sources: [{path: p}]}\n"


def length(rows: int, *overrides: str, processes: int = 1, tokens: int | None = None) -> RunLength:
    recipe = Recipe.from_text(TEXT, overrides=overrides)
    return run_length(recipe, rows=rows, tokens=10 * rows if tokens is None else tokens, processes=processes)


@pytest.mark.parametrize(
    ("rows", "overrides", "accumulation", "steps"),
    [
        (1000, (), 16, 63),
        (305, (), 16, 20),
        (304, (), 15, 21),
        (91, (), 4, 23),
        (25, (), 1, 25),
        (6, (), 1, 6),
        (100, ("train.num_train_epochs=3",), 16, 21),
        (80, ("train.num_train_epochs=3",), 13, 21),
        (100, ("train.per_device_train_batch_size=4",), 1, 25),
        (91, ("train.gradient_accumulation_steps=16",), 16, 6),
        (91, ("train.gradient_accumulation_steps=32",), 32, 3),
        (6, ("train.max_steps=30",), 16, 30),
    ],
)
def test_a_small_data_set_still_makes_twenty_steps(
    rows: int, overrides: tuple[str, ...], accumulation: int, steps: int
) -> None:
    found = length(rows, *overrides)
    assert (found.accumulation, found.steps) == (accumulation, steps)
    assert found.accumulation <= 16 or not found.chosen
    assert found.chosen == (not any("accumulation" in word for word in overrides))


def test_one_more_micro_batch_would_make_too_few() -> None:
    for rows in range(21, 400, 7):
        found = length(rows)
        assert found.steps >= 20
        more = f"train.gradient_accumulation_steps={found.accumulation + 1}"
        assert found.accumulation == 16 or length(rows, more).steps < 20


def test_devices_share_the_batches() -> None:
    assert (length(640, processes=2).accumulation, length(640, processes=2).steps) == (16, 20)
    assert length(600, processes=2).accumulation == 15


@pytest.mark.parametrize(
    ("rows", "overrides"),
    [
        (1, ()), (6, ()), (19, ()), (91, ("train.gradient_accumulation_steps=16",)),
        (30, ("train.per_device_train_batch_size=4",)), (7, ("train.num_train_epochs=2",)),
        (100, ("train.num_train_epochs=0.1",)), (5, ("train.per_device_train_batch_size=64",)),
        (500, ("train.max_steps=3",)),
        (40, ("train.gradient_accumulation_steps=8", "train.num_train_epochs=3")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("processes", [1, 2])
def test_the_fields_that_are_named_make_a_run_long_enough(
    rows: int, overrides: tuple[str, ...], processes: int
) -> None:
    (warning,) = length(rows, *overrides, processes=processes).warnings()
    text, fields = warning.split("\n")
    assert "too few to learn much" in text
    changed = length(rows, *overrides, *fields.split(), processes=processes)
    assert 20 <= changed.steps <= 60
    assert changed.warnings() == []


def test_the_sum_is_told() -> None:
    (warning,) = length(91, "train.gradient_accumulation_steps=16", tokens=18_200).warnings()
    assert warning == (
        "18,200 tokens an epoch, 3,033 a step, 1 epoch: 6 steps, too few to learn much; for 20 or more:\n"
        "train.gradient_accumulation_steps=4"
    )
    assert length(2).warnings()[0].split("\n")[1] == "train.num_train_epochs=10"


def test_a_run_long_enough_draws_no_warning() -> None:
    assert length(400).warnings() == []
    assert length(400, "train.max_steps=20").warnings() == []


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("train.warmup_steps=50",), "warm-up takes 40 of 40 steps"),
        (("train.warmup_steps=21",), "warm-up takes 21 of 40 steps"),
        (("train.warmup_steps=0.6",), "warm-up takes 24 of 40 steps"),
        (("train.warmup_steps=20",), None),
        (("train.warmup_steps=0.03",), None),
    ],
)
def test_a_warm_up_that_takes_most_of_the_run_is_told(overrides: tuple[str, ...], told: str | None) -> None:
    found = length(400, "train.max_steps=40", *overrides).warnings()
    assert len(found) == (told is not None)
    if told:
        text, fields = found[0].split("\n")
        assert told in text
        assert length(400, "train.max_steps=40", *overrides, *fields.split()).warnings() == []


def test_the_resolved_recipe_has_the_number() -> None:
    recipe = with_accumulation(Recipe.from_text(TEXT), 3)
    assert recipe.train.gradient_accumulation_steps == 3
    assert Recipe.from_text(recipe.to_yaml()) == recipe


@pytest.fixture
def short(recipe: Any, tmp_path: Path) -> str:
    """The file of a recipe whose 48 chats are four packed rows, and which leaves the accumulation out."""
    path = tmp_path / "short.yaml"
    made = recipe("train.max_steps=-1", "data.max_length=256", "train.gradient_accumulation_steps=null")
    path.write_text(made.to_yaml())
    return str(path)


@pytest.mark.parametrize("verb", [("data",), ("plan",), ("train", "--dry-run")])
def test_every_verb_that_looks_ahead_warns(verb: tuple[str, ...], short: str) -> None:
    shown = CliRunner().invoke(app, [*verb, short])
    assert shown.exit_code == 0, shown.output
    assert "too few to learn much" in " ".join(shown.output.split())
    fields = next(line.split() for line in shown.output.splitlines() if line.strip().startswith("train."))
    assert any(word.startswith("train.num_train_epochs=") for word in fields)
    changed = CliRunner().invoke(app, [*verb, short, *fields])
    assert changed.exit_code == 0, changed.output
    assert "too few to learn much" not in " ".join(changed.output.split())


def test_json_has_it_too(short: str) -> None:
    data = json.loads(CliRunner().invoke(app, ["data", short, "--json"]).stdout)
    plan = json.loads(CliRunner().invoke(app, ["plan", short, "--json"]).stdout)
    assert data["length"]["steps"] == plan["steps"] < 20
    assert data["length"]["accumulation"] == plan["gradient_accumulation_steps"] == 1
    assert any("too few to learn much" in warning for warning in data["warnings"])
    assert any("too few to learn much" in warning for warning in plan["warnings"])
