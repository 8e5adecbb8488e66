"""Every recipe that comes with the package loads, says what it is for, and survives a round trip."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mamba_sft.recipe.builtin import builtin_recipes
from mamba_sft.recipe.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_builtin_recipes_are_the_files() -> None:
    assert list(builtin_recipes()) == sorted(path.stem for path in RECIPES)
    assert {"instruct", "instruct-qlora", "instruct-t4"} <= set(builtin_recipes())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_loads_and_round_trips(path: Path) -> None:
    recipe = Recipe.load(path)
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    assert recipe.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_opens_with_hardware_command_memory_and_time(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\noutput_dir")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    commands = re.findall(r"mamba-sft train (\S+)(.*)", head)
    assert commands
    for name, rest in commands:
        overrides = [word for word in rest.split() if "=" in word]
        assert Recipe.load(name, overrides=overrides)
        assert Path(name).stem == path.stem
    assert "memory" in head.lower()
    assert re.search(r"measured|estimated", head)


def test_t4_recipe_avoids_bfloat16() -> None:
    assert Recipe.load("instruct-t4").model.dtype == "float16"
    assert Recipe.load("instruct-qlora").model.quantization == "nf4"
