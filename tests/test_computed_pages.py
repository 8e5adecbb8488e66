"""What the pages take from the code is what the code says now."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mamba_sft.planning.memory import peak
from mamba_sft.planning.plan import make_plan
from mamba_sft.planning.sharing import shared_parts
from mamba_sft.recipe.options import fields
from mamba_sft.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
COMPUTED = ROOT / "docs/computed"


@pytest.fixture(autouse=True)
def _no_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.model.shape._cached_config", lambda section: None)


@pytest.fixture(autouse=True)
def _pinned_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans count the kernels as the Triton here compiles them; the pages have those of the pinned one."""
    monkeypatch.setattr("mamba_sft.kernels.launching.TRITON", (3, 7))


@pytest.fixture(scope="module")
def pages() -> Iterator[Any]:
    before = list(sys.path)
    sys.path.insert(0, str(COMPUTED))
    yield importlib.import_module("pages")
    sys.path[:] = before
    for path in COMPUTED.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_every_block_is_what_is_computed(pages: Any) -> None:
    """After a change: `python docs/computed/pages.py`."""
    found = pages.computed_pages()
    assert {page.name for page in found} == {
        "README.md", "recipes.md", "recipe-fields.md", "choosing-a-card.md", "troubleshooting.md",
    }  # fmt: skip
    for page in found:
        text = page.read_text(encoding="utf-8")
        assert pages.with_computed(text) == text, page.name
    changed = (ROOT / "README.md").read_text(encoding="utf-8").replace("34.8 GiB", "34.7 GiB", 1)
    assert pages.with_computed(changed) != changed


def test_recipes_say_the_memory_that_is_planned(pages: Any) -> None:
    """The comment at a recipe's head, against the plan for the card that it is made for."""
    said = 0
    for name, (card, count, _) in importlib.import_module("recipe_table").CARDS.items():
        head = (ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8").partition("\noutput_dir")[0]
        found = re.search(r"not yet measured: (?:about )?([\d.]+) (?:GiB|of the)", head)
        if found is None:
            continue
        plan = make_plan(Recipe.load(name), card)
        planned = peak(shared_parts("ddp", plan.parts, plan.work, count)) / 2**30
        assert float(found[1]) == pytest.approx(planned, abs=0.5), name
        said += 1
    assert said == 7


def test_every_field_of_a_recipe_is_explained(pages: Any) -> None:
    page = (ROOT / "docs/recipe-fields.md").read_text(encoding="utf-8")
    for field in fields():
        section, _, name = field.name.rpartition(".")
        part = page.partition(f"\n## `{section}`\n" if section else "\n## At the top\n")[2].partition(
            "\n## "
        )[0]
        assert f"\n| `{name}` | " in part, field.name


def test_hints_are_read_from_errors_whatever_their_form(pages: Any) -> None:
    hints = importlib.import_module("hints")
    source = """
HOW = "do this"
def refuse(name, kind):
    if name:
        raise DataError(f"`{name}` is " + "no file", hint=HOW)
    if not kind:
        raise UsageError("two ways", hint="one" if name else f"the other: `{name}{kind}`")
    raise kind(f"cannot: {name}", hint=f"then {HOW}")
    log("no error", hint="never")
    raise DataError("said elsewhere", hint=elsewhere(name))
"""
    assert set(hints.errors_with_hints(source)) == {
        ("`...` is no file", "do this"),
        ("two ways", "one"),
        ("two ways", "the other: `...`"),
        ("cannot: ...", "then do this"),
    }
    assert hints._cell("a | `b|c*` <d>") == r"a \| `b\|c*` \<d\>"


def test_links_out_of_the_pages_go_to_the_repository_where_it_is_known(pages: Any) -> None:
    hooks = importlib.import_module("hooks")
    text = "see the [log](../benchmarks/LOG.md) and [here](faq.md)"
    assert hooks.with_outside_links(text, None) == "see the log and [here](faq.md)"
    linked = hooks.with_outside_links(text, "https://example.org/a/b/")
    assert "[log](https://example.org/a/b/blob/main/benchmarks/LOG.md)" in linked


# --- the recording ------------------------------------------------------------------------------------------

SHOW = """
import time
print("\\x1b[32mgreen\\x1b[0m & <plain>")
for at in range(3):
    print(f"\\rstep {at}", end="", flush=True)
    time.sleep(0.05)
print()
for at in range(40):
    print(f"line {at}")
"""


def test_a_recording_shows_what_was_on_the_screen(pages: Any) -> None:
    pytest.importorskip("pyte")
    from xml.etree import ElementTree

    recording = importlib.import_module("recording")
    made = recording.record([[sys.executable, "-c", SHOW]], columns=60, rows=20)
    words = [" ".join(piece[1] for line in shot.lines for piece in line) for shot in made.shots]
    assert any("step 0" in one for one in words)
    assert any("line 5 " in one for one in words)  # scrolled away by the end
    assert words[-1].endswith("line 39")
    assert "step" not in words[-1]
    drawn = recording.drawn(made, "a title")
    tree = ElementTree.fromstring(drawn)
    texts = [one.text for one in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "& <plain>" in texts
    assert f'fill="{recording.COLOURS["green"]}">green<' in drawn
    assert texts.count("line 39") == 1


def test_of_many_screens_those_to_be_read_stay(pages: Any) -> None:
    pytest.importorskip("pyte")
    recording = importlib.import_module("recording")
    shots = [recording.Shot(((at, "x", "default", False),)) for at in range(500)]
    shots[250] = recording.Shot((), recording.READ_S)
    kept = recording.chosen([*shots, recording.Shot((), recording.LAST_S)])
    assert len(kept) == recording.MOST + 2
    assert kept[0] == shots[0]
    assert recording.READ_S in [shot.seconds for shot in kept]


def test_a_command_that_fails_is_no_recording(pages: Any) -> None:
    pytest.importorskip("pyte")
    recording = importlib.import_module("recording")
    with pytest.raises(SystemExit, match="exit code 3"):
        recording.record([[sys.executable, "-c", "raise SystemExit(3)"]])


def test_the_recording_in_the_readme_is_of_nobodys_machine() -> None:
    text = (ROOT / "docs/quickstart.svg").read_text(encoding="utf-8")
    assert "exact match on 207 held-out prompts" in text
    assert "/root" not in text
    assert "/home" not in text
    assert "/tmp" not in text
