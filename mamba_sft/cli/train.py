"""The verb `train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mamba_sft.cli.console import Overrides, RecipeArgument, err, out, quiet_loading

if TYPE_CHECKING:
    from mamba_sft.run import Run


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on exactly where the last checkpoint stopped.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run of the same name.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, stop before the weights.")
    ] = False,
) -> None:
    """Fine-tune a base model as a recipe says: `mamba-sft train recipes/quickstart.yaml`."""
    from mamba_sft.recipe.recipe import Recipe

    loaded = Recipe.load(recipe, overrides=overrides or [])
    from mamba_sft.cli.progress import TrainingBar
    from mamba_sft.data.summary import FITS_NO_CHAT
    from mamba_sft.training.fine_tuning import prepare, train_prepared

    preparation = prepare(loaded, resume=resume, overwrite=overwrite or dry_run)
    fits_no_chat = preparation.data.summary.fits_no_chat
    if dry_run:
        from mamba_sft.cli.preview import statistics

        err.print(statistics(preparation.data.summary))
        out.print(
            f"{len(preparation.data.train_rows):,} training rows, {preparation.max_steps:,} steps;"
            f" all is well before the weights; without `--dry-run` this trains into {preparation.run.path}"
        )
        return
    quiet_loading()
    if fits_no_chat:
        err.print(f"[bold yellow]![/] {escape(FITS_NO_CHAT)}")
    bar = TrainingBar(err)
    try:
        run = train_prepared(preparation, callbacks=[bar])
    finally:
        bar.close()
    _show_samples(run, fits_no_chat)
    out.print(f"trained: {run.path}  (report: {run.report})")
    out.print(f"next:    mamba-sft chat {run.path}   or   mamba-sft merge {run.path}")


def _show_samples(run: Run, fits_no_chat: bool, rows: int = 6) -> None:
    from mamba_sft.evaluation.prompts import exact_match, read_samples

    if not run.samples.exists():
        return
    samples = read_samples(run.samples)
    table = Table(title="sample answers", show_lines=True, expand=True)
    for title, ratio in (("prompt", 3), ("base", 3), ("tuned", 3)):
        table.add_column(title, ratio=ratio, overflow="fold")
    for sample in samples[:rows]:
        table.add_row(*(escape(_short(text)) for text in (sample.prompt.prompt, sample.before, sample.after)))
    err.print(table)
    prompts = [sample.prompt for sample in samples]
    before = exact_match(prompts, [sample.before for sample in samples])
    after = exact_match(prompts, [sample.after for sample in samples])
    if before is not None and after is not None:
        count = sum(prompt.answer is not None for prompt in prompts)
        out.print(f"exact match on {count} held-out prompts: {before:.1%} before, {after:.1%} after")
    if fits_no_chat:
        err.print("[bold yellow]![/] these prompts went through the chat template, which no trained row did")


def _short(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
