"""The verb `recipes`: the built-in ones, and the schema."""

from __future__ import annotations

import json
import sys
import textwrap
from typing import Annotated

import typer

from mamba_sft.cli import completing
from mamba_sft.cli.console import Json, out, write_json
from mamba_sft.cli.help import Verb, Verbs
from mamba_sft.errors import UsageError

_LEAST = 30
"""Columns of a text beside a name, in the narrowest of terminals."""

recipes_app = typer.Typer(
    no_args_is_help=False,
    invoke_without_command=True,
    cls=Verbs,
    help="""List the built-in recipes, show one, or describe all fields.

    Example: mamba-sft recipes
    """,
)


@recipes_app.callback()
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """List the built-in recipes."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise UsageError("`--json` is for the list of recipes", hint="`mamba-sft recipes --json`")
        return
    from mamba_sft.recipe.builtin import about_builtin

    found = about_builtin()
    if as_json:
        write_json([{"name": name, "for": about} for name, about in found.items()])
        return
    width = max(map(len, found)) + 1
    for name, about in found.items():
        lines = textwrap.wrap(about, max(out.width - width - 1, _LEAST)) if out.is_terminal else [about]
        out.print(f"{name:<{width}} " + f"\n{'':<{width}} ".join(lines))


@recipes_app.command("show", cls=Verb)
def recipes_show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="The name of a built-in recipe.", autocompletion=completing.builtin
        ),
    ],
) -> None:
    """Print a built-in recipe, to start your own from.

    Example: mamba-sft recipes show quickstart > mine.yaml
    """
    from difflib import get_close_matches

    from mamba_sft.recipe.builtin import builtin_recipes

    found = builtin_recipes()
    if name not in found:
        close = get_close_matches(name, found, n=1)
        question = f"; did you mean `{close[0]}`?" if close else ""
        raise UsageError(
            f"no built-in recipe `{name}`{question}",
            hint="there are " + ", ".join(f"`{known}`" for known in found),
        )
    sys.stdout.write(found[name].read_text(encoding="utf-8"))


@recipes_app.command("schema", cls=Verb)
def recipes_schema() -> None:
    """Print the JSON schema of a recipe, for editors.

    Example: mamba-sft recipes schema > recipe.schema.json
    """
    from mamba_sft.recipe.recipe import recipe_schema

    sys.stdout.write(json.dumps(recipe_schema(), indent=2) + "\n")
