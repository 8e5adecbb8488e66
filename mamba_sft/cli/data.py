"""The verb `data`."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.table import Table

from mamba_sft.cli import completing
from mamba_sft.cli.console import Json, Overrides, err, loading, out, write_json
from mamba_sft.cli.hub_reach import may_name_the_hub, use_cache_if_unreachable
from mamba_sft.errors import UsageError
from mamba_sft.wording import size_text, time_text


def data(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="A recipe file, or the name of a built-in one.",
            autocompletion=completing.recipes,
        ),
    ] = None,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(metavar="N", help="Rows to show as tokens.", min=0)] = 3,
    as_json: Json = False,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Only prepare the rows; `train` finds them done.")
    ] = False,
    cached: Annotated[bool, typer.Option("--cached", help="List the prepared rows that are kept.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="With `--cached`: remove them.")] = False,
) -> None:
    """Show what a recipe trains on: tokens, lengths, what is left out.

    Example: mamba-sft data quickstart --rows 1
    """
    if clear and not cached:
        raise UsageError("`--clear` goes with `--cached`", hint="`mamba-sft data --cached --clear`")
    if cached:
        if recipe is not None or prepare:
            raise UsageError("`--cached` is about all recipes", hint="leave out the recipe and `--prepare`")
        _show_cached(as_json, clear=clear)
        return
    if prepare and as_json:
        raise UsageError("`--prepare` shows no rows, and prints no JSON", hint="leave one of the two out")
    if recipe is None:
        raise UsageError("which recipe?", hint="`mamba-sft data RECIPE`, or `mamba-sft data --cached`")
    from mamba_sft.recipe.recipe import Recipe

    loaded = Recipe.load(recipe, overrides=overrides or [])
    if may_name_the_hub(source.path for source in loaded.data.sources):
        use_cache_if_unreachable()
    from mamba_sft.data.sources import check_source

    for source in loaded.data.sources:
        check_source(source)
    with loading("torch and transformers"):
        from mamba_sft.cli import preview
        from mamba_sft.data.preparing import read_corpus
        from mamba_sft.planning.settling import settle

    started = time.monotonic()
    setup, prepared = read_corpus(loaded)
    settled = settle(loaded, prepared)
    prepared, length = settled.data, settled.length
    packing = prepared.packing
    mixture = settled.mixture.to_dict() if settled.mixture is not None else None
    if prepare:
        err.print(preview.statistics(prepared.summary, packing, length, mixture), crop=False)
        out.print(f"prepared in {time_text(time.monotonic() - started)}: {prepared.path}")
    elif as_json:
        content = preview.to_dict(
            prepared, setup.tokenizer, rows=rows, packing=packing, length=length, mixture=mixture
        )
        write_json(content)
    else:
        shown = preview.overview(
            prepared, setup.tokenizer, rows=rows, packing=packing, length=length, mixture=mixture
        )
        out.print(shown, soft_wrap=False, crop=False)  # texts wrap, names of files do not


def _show_cached(as_json: bool, *, clear: bool) -> None:
    from mamba_sft.data import cache

    found = cache.clear() if clear else cache.entries()
    if as_json:
        content = [
            {
                "path": str(one.path),
                "sources": one.sources,
                "rows": one.rows,
                "tokens": one.tokens,
                "bytes": one.nbytes,
            }
            for one in found
        ]
        write_json(content)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("sources", overflow="fold")
    for name in ("rows", "tokens", "size", "last used"):
        table.add_column(name, justify="right")
    for one in found:
        age = f"{time_text(time.time() - one.used)} ago"
        counts = (f"{one.rows:,}", f"{one.tokens:,}", size_text(one.nbytes), age)
        table.add_row(", ".join(one.sources), *counts)
    if found:
        out.print(table)
    total = size_text(sum(one.nbytes for one in found))
    done = "removed" if clear else "kept in"
    count = "one entry" if len(found) == 1 else f"{len(found):,} entries"
    out.print(f"{count}, {total}, {done} {cache.cache_root()}")
