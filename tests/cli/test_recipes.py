"""The list of built-in recipes, as a terminal shows it and as a pipe gets it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from mamba_sft.cli import recipes
from mamba_sft.cli.app import app
from mamba_sft.recipe.builtin import builtin_recipes


def test_a_pipe_gets_a_line_each() -> None:
    lines = CliRunner().invoke(app, ["recipes"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(builtin_recipes())
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines}) == 1
    assert all(line.endswith(".") for line in lines)


def test_a_terminal_gets_them_beside_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes.out, "_force_terminal", True)
    monkeypatch.setattr(recipes.out, "width", 60)
    lines = CliRunner().invoke(app, ["recipes"]).stdout.splitlines()
    width = max(map(len, builtin_recipes())) + 2
    assert len(lines) > 2 * len(builtin_recipes())
    assert all(len(line) <= 60 for line in lines)
    assert {line[:width].strip() for line in lines} == {"", *builtin_recipes()}


def test_json_has_the_same() -> None:
    found = json.loads(CliRunner().invoke(app, ["recipes", "--json"]).stdout)
    assert all("\n" not in one["for"] and one["for"].endswith(".") for one in found)
