"""What the pages say that a program can check."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mamba_sft.cli.app import app
from mamba_sft.planning.communication import Cluster
from mamba_sft.planning.many import plan_many
from mamba_sft.planning.plan import make_plan
from mamba_sft.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/many-gpus.md"


@pytest.fixture(autouse=True)
def _no_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.model.shape._cached_config", lambda section: None)


@pytest.fixture(scope="module")
def tables() -> Any:
    spec = importlib.util.spec_from_file_location("many_gpus", ROOT / "benchmarks/many_gpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_plan_computes(tables: Any) -> None:
    """After a change: `python benchmarks/many_gpus.py --write`."""
    page = PAGE.read_text(encoding="utf-8")
    assert tables.with_tables(page) == page
    assert "\n| 256 | 26.0 GiB | 321 MiB |" in page


def test_a_table_that_is_not_computed_is_seen(tables: Any) -> None:
    page = PAGE.read_text(encoding="utf-8").replace("| 321 MiB |", "| 322 MiB |", 1)
    assert tables.with_tables(page) != page


def test_one_number_of_the_page_by_hand() -> None:
    """16 GPUs on two machines at 25 Gb/s: 169 MB there and back, at 80 % of 3.125 GB/s, in 7 buckets."""
    recipe = Recipe.load("instruct-multi-gpu")
    many = plan_many(recipe, make_plan(recipe, "h100"), Cluster(8, 2, 25.0))
    trained = 4 * (64 * 16 * (20480 + 8480 + 12288) + 4 * 4096)
    by_hand = 2 * 15 / 16 * trained / 2.5e9 + 7 * 30 * 20e-6
    assert many.shared[0].communication == pytest.approx(by_hand)
    assert "| 16 | 26.0 GiB | 302 MiB | 131 ms, 11.3% |" in PAGE.read_text(encoding="utf-8")


class OptionsTakenError(Exception):
    """What a command comes to when its options and its recipe were read."""


def test_the_commands_of_the_page_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*words: Any, **more: Any) -> None:
        raise OptionsTakenError

    monkeypatch.setattr("mamba_sft.training.first_checks.check_first", taken)
    page = PAGE.read_text(encoding="utf-8")
    lines = re.findall(r"^mamba-sft ([^#\n]*)", page, re.MULTILINE)
    commands = [line.split() for line in lines]
    assert len(commands) == 6
    for words in commands:
        result = CliRunner().invoke(app, words)
        if words[0] == "train":
            assert isinstance(result.exception, OptionsTakenError), result.output
        else:
            assert result.exit_code == 0, result.output


def test_links_lead_to_files() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
