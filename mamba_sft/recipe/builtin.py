"""Where recipes and their data are found: the working directory first, then what the package brings."""

from __future__ import annotations

import glob
import os
import re
import shlex
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path

from mamba_sft.errors import RecipeError, UsageError
from mamba_sft.other_files import fetching, other_file
from mamba_sft.packed_files import CANNOT_READ, kind_of_file, open_bytes
from mamba_sft.recipe.globs import matching
from mamba_sft.recipe.yaml_text import flow_text
from mamba_sft.run import Run
from mamba_sft.wording import shown

PACKAGE = Path(__file__).parents[1]
_DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_MODELS = (".gguf", ".safetensors", ".bin", ".pt", ".pth")


def bundled_root() -> Path:
    """The directory of `recipes/` and `data/`: inside the package in a wheel, else the checkout's root.

    Raises:
        RecipeError: Neither is there, which means the installation is damaged.
    """
    for root in (PACKAGE / "bundled", PACKAGE.parent):
        if (root / "recipes").is_dir():
            return root
    raise RecipeError(f"`{PACKAGE}` comes without its recipes", hint="install mamba-sft again")


def builtin_recipes() -> dict[str, Path]:
    """The built-in recipes by name, sorted."""
    paths = (bundled_root() / "recipes").glob("*.yaml")
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}


def about_builtin() -> dict[str, str]:
    """What each built-in recipe is for, by its name: the first paragraph of the comment it begins with."""
    return {name: _about(path.read_text(encoding="utf-8")) for name, path in builtin_recipes().items()}


def _about(recipe: str) -> str:
    lines = takewhile(lambda line: line.strip("# "), recipe.splitlines())
    return " ".join(line.lstrip("# ").rstrip() for line in lines)


def find_path(text: str) -> Path:
    """Finds a file, directory or glob: from the working directory, then from `bundled_root()`.

    Returns:
        The path where something exists; `Path(text)` where nothing does.

    Raises:
        UsageError: No file can have that name, or it is a glob that would look through a whole disk.
    """
    path = expanded(text)
    for candidate in (path, bundled_root() / path):
        if os.path.exists(candidate):
            return candidate
        if glob.has_magic(text) and next(matching(candidate), None) is not None:
            return candidate
    return path


def is_here(text: str) -> bool:
    """Returns whether `find_path` finds a file or a directory, or the glob names one."""
    found = find_path(text)
    return os.path.exists(found) or (glob.has_magic(text) and next(matching(found), None) is not None)


def expanded(text: str) -> Path:
    """The path that a text names, `~` and `~user` resolved.

    Raises:
        UsageError: There is no such user, or no file can have that name.
    """
    names = text.encode("utf-8", "surrogatepass").split(b"/")
    if max(map(len, names)) > 255 or sum(map(len, names)) + len(names) > 1024 or "\0" in text:
        raise UsageError(
            f"no file can be called `{shown(text)}`",
            hint="a path has up to 1,024 bytes, each name in it up to 255",
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:  # what pathlib raises
        user = shown(text.partition("/")[0])
        raise UsageError(
            f"`{shown(text)}`: there is no user `{user[1:]}` here",
            hint=f"write `./{user}` for a file of that name" if user != "~" else None,
        ) from None


def find_recipe(text: str) -> Path:
    """Finds a recipe file, or a built-in recipe by its name.

    Raises:
        RecipeError: There is neither; lists the built-in names. Or it is a file of data, or of a model.
    """
    built_in = builtin_recipes()
    if not text:
        raise RecipeError("the recipe's name is empty", hint="built-in recipes: " + ", ".join(built_in))
    for path in (expanded(text), bundled_root() / text):
        if os.path.isfile(path):
            _refuse_other_files(text, path)
            return path
    if text in built_in:
        return built_in[text]
    if os.path.isdir(expanded(text)):
        own = Run(expanded(text)).recipe
        hint = f"its recipe is `{own}`" if own.is_file() else None
        hint = hint or "give a YAML file or the name of a built-in recipe"
        raise RecipeError(f"recipe `{shown(text)}` is a directory", hint=hint)
    raise _no_recipe(text, list(built_in))


def _no_recipe(text: str, built_in: list[str]) -> RecipeError:
    """What is said where nothing is that a recipe's name means."""
    said, path = shown(text, 300), expanded(text)
    if re.match(r"[a-z][a-z_.0-9]*=", text):
        return RecipeError(
            f"`{said}` changes a field, and no recipe is named",
            hint=f"the recipe comes first: mamba-sft train quickstart {shlex.quote(text)}",
        )
    if path.is_symlink():
        return RecipeError(f"no recipe `{said}`: it is a link to `{os.readlink(path)}`, which leads nowhere")
    if "://" in text:
        return RecipeError(f"`{said}` is an address, not a file", hint=f"fetch it first: {fetching(text)}")
    own = [path.stem] if path.stem in built_in else []
    close = own or _recipes_like(path) or get_close_matches(path.stem, built_in, n=1)
    question = f"; did you mean `{close[0]}`?" if close else ""
    return RecipeError(
        f"no recipe `{said}`: neither a file nor a built-in recipe{question}",
        hint="built-in recipes: " + ", ".join(built_in),
    )


def _recipes_like(path: Path) -> list[str]:
    """The YAML file beside a place where nothing is that has nearly its name."""
    try:
        names = [name for name in os.listdir(path.parent) if name.endswith((".yaml", ".yml"))]
    except OSError:
        return []
    return [shown(str(path.with_name(name)), 300) for name in get_close_matches(path.name, names, n=1)]


_NO_RECIPES = {".ipynb": "a notebook", ".py": "a program", ".md": "a page of text", ".toml": "TOML"}


def _refuse_other_files(text: str, path: Path) -> None:
    kind = kind_of_file(path)
    if other := other_file(path):
        raise RecipeError(f"`{shown(text)}` is {other.what}", hint=other.hint)
    if kind in _NO_RECIPES:
        raise RecipeError(
            f"`{shown(text)}` is {_NO_RECIPES[kind]}, not a recipe",
            hint="a recipe is YAML; `mamba-sft recipes show quickstart` prints one",
        )
    if kind in _MODELS:
        raise RecipeError(
            f"`{shown(text)}` is a model's file, not a recipe",
            hint="a recipe is YAML: give a file, or the name of a built-in one (`mamba-sft recipes`)",
        )
    if kind not in _DATA and not (kind in (".json", ".txt") and _holds_rows(path)):
        return
    raise RecipeError(
        f"`{shown(text)}` is a file of data, not a recipe",
        hint=f"name it in a recipe, for example: mamba-sft train instruct-qlora {own_data(text)}",
    )


def own_data(path: str | Path) -> str:
    """Returns the override that reads a file instead of a recipe's sources, as a shell takes it."""
    return shlex.quote(f"data.sources=[{{path: {flow_text(str(path))}}}]")


def _holds_rows(path: Path) -> bool:
    """Whether a file that may be a recipe, by its name, begins with rows or text instead of fields."""
    try:
        with open_bytes(path) as file:
            start = file.read(4096).decode("utf-8", errors="replace").lstrip("\ufeff \r\n\t")
    except CANNOT_READ:
        return False
    if start.startswith("{"):
        return not re.search(r'"(model|output_dir)"\s*:', start)
    return re.match(r"(#|---|[a-z_]+:(\s|$))", start) is None
