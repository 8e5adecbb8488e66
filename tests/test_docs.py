"""What the pages say that a program can check."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import mamba_sft
from mamba_sft.cli.app import app
from mamba_sft.planning.communication import Cluster
from mamba_sft.planning.many import plan_many
from mamba_sft.planning.plan import make_plan
from mamba_sft.recipe.builtin import builtin_recipes
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


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors_of(page: str) -> set[str]:
    """What headings can be linked by: lower case, blanks as hyphens, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^):]+)\)", text):
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), f"{page.name}: {target}"
        if anchor:
            linked = (page.parent / path).read_text(encoding="utf-8") if path else text
            assert anchor in anchors_of(linked), f"{page.name}: {target}"


def shown_commands(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines += re.findall(r"(?<!`)`(mamba-sft [a-z][^`\n]*)`(?!`)", text)
    return [
        line.partition(" #")[0].replace("[", "").replace("]", "")
        for line in lines
        if line.startswith("mamba-sft ")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_verbs_and_options_that_there_are(page: Path) -> None:
    answered = "--lr 1e-4 --max-steps 20"  # shown with what is answered
    for command in shown_commands(page):
        if answered in command or page.name == "verbs.md":
            continue
        group, words = get_command(app), command.split()[1:]
        while getattr(group, "commands", None) and words and not words[0].startswith("-"):
            assert words[0] in group.commands, command
            group, words = group.commands[words[0]], words[1:]
        known = {name for param in group.params for name in (*param.opts, *param.secondary_opts)}
        assert {word for word in words if re.match(r"--?[a-z]", word)} <= known | {"-h"}, command
        recipes = [word for word in words[:1] if re.fullmatch(r"[a-z][a-z0-9-]+", word)]
        if group.name in ("train", "plan", "data") and recipes:
            assert recipes[0] in builtin_recipes(), command


def test_the_readme_fits_and_has_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    assert "\npip install -c constraints.txt -e . && mamba-sft train recipes/quickstart.yaml\n" in readme
    tests = "<!-- test command -->\n```\npip install -c constraints.txt -e '.[test]' && pytest -n auto\n```\n"
    assert tests in readme


def test_every_extra_is_in_the_table_with_its_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\|([^|]*)\|.*pip install", page, re.MULTILINE)))
    assert set(project["optional-dependencies"]) <= set(named)


def test_all_pages_are_in_the_site() -> None:
    """mkdocs' own check, without mkdocs: pages that a line of the menu waits for are commented there."""
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"^ *- ([\w-]+\.md)$", menu, re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES[1:]]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    for name in (*mamba_sft.__all__, "selective_scan"):
        assert re.search(rf'id="[\w.]*\b{name}"', api), name
    assert not (tmp_path / "site/computed").exists()


def test_own_data_behind_a_recipe_is_taken_as_a_page_says() -> None:
    """Of a file a split means nothing, so the whole list of sources has to be replaced, not a path in it."""
    page = (ROOT / "docs/one-24gb-card.md").read_text(encoding="utf-8")
    shown = re.search(r"^\| your own data \| `([^`]+)`", page, re.MULTILINE)
    assert shown is not None
    (source,) = Recipe.load("instruct-qlora", overrides=shlex.split(shown[1])).data.sources
    assert (source.path, source.split, source.limit) == ("mine.jsonl", "train", None)


def test_the_chat_template_of_the_page_trains_the_answer_and_its_end(tmp_path: Path) -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    shown = re.search(r"^```jinja\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert shown is not None
    template = tmp_path / "mine.jinja"
    template.write_text(shown[1], encoding="utf-8")
    words = ["data", "quickstart", f"chat.template={template}", "data.sources.0.limit=60", "--rows", "1"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert re.search(r"### Answer:.*\n.*⟦The last word is rug\.<\|endoftext\|>⟧", said.output), said.output
