"""Where recipes and their data are found: the working directory first, then what the package brings."""

from __future__ import annotations

import glob
import os
from difflib import get_close_matches
from pathlib import Path

from mamba_sft.errors import RecipeError

PACKAGE = Path(__file__).parents[1]


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


def find_path(text: str) -> Path:
    """Finds a file, directory or glob: from the working directory, then from `bundled_root()`.

    Returns:
        The path where something exists; `Path(text)` where nothing does.
    """
    path = Path(text).expanduser()
    for candidate in (path, bundled_root() / path):
        if os.path.exists(candidate) or glob.glob(str(candidate), recursive=True):
            return candidate
    return path


def find_recipe(text: str) -> Path:
    """Finds a recipe file, or a built-in recipe by its name.

    Raises:
        RecipeError: There is neither; lists the built-in names.
    """
    path, built_in = find_path(text), builtin_recipes()
    if os.path.isfile(path):
        return path
    if text in built_in:
        return built_in[text]
    if os.path.isdir(path):
        raise RecipeError(
            f"recipe `{text}` is a directory", hint="give a YAML file or the name of a built-in recipe"
        )
    close = get_close_matches(Path(text).stem, built_in, n=1)
    question = f"; did you mean `{close[0]}`?" if close else ""
    raise RecipeError(
        f"no recipe `{text}`: neither a file nor a built-in recipe{question}",
        hint="built-in recipes: " + ", ".join(built_in),
    )
