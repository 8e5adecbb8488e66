"""The verb `recipes`: the built-in ones, and the schema."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from mamba_sft.cli.console import out
from mamba_sft.errors import UsageError

recipes_app = typer.Typer(
    no_args_is_help=False, invoke_without_command=True, help="List, show and describe recipes."
)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the built-in recipes."""
    if context.invoked_subcommand is not None:
        return
    from mamba_sft.recipe.builtin import builtin_recipes

    for name, path in builtin_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        out.print(f"{name:<20} {first}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="The name of a built-in recipe.")]) -> None:
    """Print a built-in recipe: `mamba-sft recipes show quickstart > mine.yaml`."""
    from mamba_sft.recipe.builtin import builtin_recipes

    found = builtin_recipes()
    if name not in found:
        raise UsageError(
            f"no built-in recipe `{name}`", hint="there are " + ", ".join(f"`{known}`" for known in found)
        )
    sys.stdout.write(found[name].read_text(encoding="utf-8"))


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from mamba_sft.recipe.recipe import recipe_schema

    sys.stdout.write(json.dumps(recipe_schema(), indent=2) + "\n")
