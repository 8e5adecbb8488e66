"""Globs name what Python's own name, and none of them searches a whole disk."""

from __future__ import annotations

import glob
from pathlib import Path

import pytest

from mamba_sft.errors import UsageError
from mamba_sft.recipe.builtin import expanded, find_path, find_recipe
from mamba_sft.recipe.globs import matching


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "a.json",
        "b.jsonl",
        "x/a.json",
        "x/y/a.json",
        "x/y/z/b.json",
        ".hidden/a.json",
        "x/.h.json",
        "q/[1].json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "x", target_is_directory=True)
    (tmp_path / "broken.json").symlink_to(tmp_path / "nowhere")
    return tmp_path


PATTERNS = [
    "*.json",
    "*",
    "**",
    "**/*.json",
    "**/a.json",
    "x/**",
    "x/**/*.json",
    "*/a.json",
    "*/*",
    "?.json*",
    "[ab].json*",
    "nope/*",
    "x/*/a.json",
    ".*/a.json",
    "**/.h.json",
    "**/**/a.json",
    "**/y/**/*.json",
    "a.json",
    "q/[[]1].json",
    "*/**",
    "a.json/*",
    "*.json/x",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_glob_names(tree: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    for whole in (pattern, str(tree / pattern)):
        found = list(matching(Path(whole)))
        assert len(found) == len(set(found))
        assert set(found) == set(map(Path, glob.glob(whole, recursive=True)))


def test_a_directory_that_holds_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "rows.json").touch()
    for name in ("one", "two", "three"):
        (tmp_path / name).symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(UsageError, match="has more than 500 files to look through"):
        list(matching(tmp_path / "**/nothing", most=500))


def test_a_glob_over_everything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_sft.recipe.globs.matching.__defaults__", (2000,))
    with pytest.raises(UsageError) as caught:
        find_path("/**/**/**/no such file")
    assert (
        caught.value.message == "the glob `/**/**/**/no such file` has more than 2,000 files to look through"
    )
    assert caught.value.hint == "begin it with the directory that the files are in"


def test_several_stars_cost_no_more_than_one(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"d{number}" / "e").mkdir(parents=True)
    with pytest.raises(UsageError):
        list(matching(tmp_path / "**/x", most=59))
    assert list(matching(tmp_path / "**/**/**/**/x", most=4 * 60)) == []  # 60 for each part, not 60 ** 4


@pytest.mark.parametrize("find", [expanded, find_path, find_recipe])
@pytest.mark.parametrize("text", ["a" * 256, "a/" * 600, "a/" + "é" * 128, "a\0b", "\x1b" * 300])
def test_what_no_file_can_be_called(find: object, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        find(text)  # type: ignore[operator]
    assert caught.value.message.startswith("no file can be called `")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("find", [expanded, find_path, find_recipe])
def test_a_user_who_is_not_there(find: object) -> None:
    with pytest.raises(UsageError) as caught:
        find("~nosuchuser/rows.jsonl")  # type: ignore[operator]
    assert caught.value.message == "`~nosuchuser/rows.jsonl`: there is no user `nosuchuser` here"
    assert caught.value.hint == "write `./~nosuchuser` for a file of that name"
