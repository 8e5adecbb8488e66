"""The verb `data`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from mamba_sft.cli.console import Json, Overrides, RecipeArgument, out


def data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Rows to show as tokens.", min=0)] = 3,
    as_json: Json = False,
) -> None:
    """Show what a recipe trains on: tokens, lengths, and what is dropped, truncated and packed."""
    from mamba_sft.recipe.recipe import Recipe

    loaded = Recipe.load(recipe, overrides=overrides or [])
    from mamba_sft.cli import preview
    from mamba_sft.data.preparing import read_corpus
    from mamba_sft.planning.extent import run_length

    setup, prepared = read_corpus(loaded)
    packing = None
    if loaded.data.packing and loaded.data.max_length:
        packing = preview.packed(prepared.summary, loaded.data.max_length, loaded.seed)
    trained = packing.rows if packing else len(prepared.train)
    length = run_length(loaded, rows=trained, tokens=prepared.summary.train_tokens)
    if as_json:
        content = preview.to_dict(prepared, setup.tokenizer, rows=rows, packing=packing, length=length)
        sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    else:
        shown = preview.overview(prepared, setup.tokenizer, rows=rows, packing=packing, length=length)
        out.print(shown, soft_wrap=False, crop=False)  # texts wrap, names of files do not
