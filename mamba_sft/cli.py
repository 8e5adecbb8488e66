"""The command line: one short function per verb. The only module that prints or exits.

Data goes to stdout, progress and messages to stderr. Exit codes: 0 done, 1 an expected failure,
2 wrong usage, 130 interrupted. Verbs import what they need when they run, so that `--help` never loads torch.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mamba_sft import __version__, cli_export, cli_plan, cli_system, cli_talk
from mamba_sft.cli_talk import err, out, quiet_loading, run_or_newest
from mamba_sft.errors import MambaSFTError, UsageError

if TYPE_CHECKING:
    from mamba_sft.merging.check import MergeReport
    from mamba_sft.run import Run

app = typer.Typer(
    name="mamba-sft",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn Falcon-Mamba into an instruct model: `train` a recipe, `merge` the adapter, `chat` with it.",
)
recipes_app = typer.Typer(
    no_args_is_help=False, invoke_without_command=True, help="List, show and describe recipes."
)
app.add_typer(recipes_app, name="recipes")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a built-in one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.field=value]...", help="Changes to the recipe's values."),
]
RunArgument = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="A run directory; default: the newest.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def main() -> None:
    """Runs the command line; expected failures become one message and an exit code."""
    try:
        app()
    except MambaSFTError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _print_error(error: MambaSFTError) -> None:
    err.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        err.print(f"[bold cyan]hint:[/] {escape(error.hint)}", soft_wrap=True)


def _version(shown: bool) -> None:
    if shown:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the libraries' own messages.")
    ] = False,
) -> None:
    """Sets up messages: ours always, those of the libraries on request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("mamba_sft")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if os.environ.get("RANK", "0") != "0":  # one of several processes speaks
        out.quiet = err.quiet = True
        logger.setLevel(logging.WARNING)
    # Waiting threads sleep instead of spinning. Spinning gains nothing measurable on an idle machine; with
    # other programs about, it made a step of the quickstart five times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import warnings

        warnings.filterwarnings(
            "ignore", module="(torch|transformers|trl|peft|accelerate|bitsandbytes|datasets).*"
        )


@app.command()
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
    from mamba_sft.progress import TrainingBar
    from mamba_sft.training.fine_tuning import fit, prepare

    preparation = prepare(loaded, resume=resume, overwrite=overwrite or dry_run)
    if dry_run:
        from mamba_sft.preview import statistics

        err.print(statistics(preparation.data.report))
        out.print(
            f"{len(preparation.train_rows):,} training rows, {preparation.max_steps:,} steps;"
            f" all is well before the weights; without `--dry-run` this trains into {preparation.run.path}"
        )
        return
    quiet_loading()
    bar = TrainingBar(err)
    try:
        run = fit(preparation, callbacks=[bar])
    finally:
        bar.close()
    _show_samples(run)
    out.print(f"trained: {run.path}  (report: {run.report})")
    out.print(f"next:    mamba-sft chat {run.path}   or   mamba-sft merge {run.path}")


def _show_samples(run: Run, rows: int = 6) -> None:
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


def _short(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


@app.command()
def data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Rows to show as tokens.", min=0)] = 3,
    as_json: Json = False,
) -> None:
    """Show what a recipe trains on: tokens, lengths, and what is dropped, truncated and packed."""
    from mamba_sft.recipe.recipe import Recipe

    loaded = Recipe.load(recipe, overrides=overrides or [])
    from mamba_sft import preview
    from mamba_sft.data.corpus import read_corpus

    setup, prepared = read_corpus(loaded)
    packing = None
    if loaded.data.packing and loaded.data.max_length:
        packing = preview.packed(prepared.report, loaded.data.max_length, loaded.seed)
    if as_json:
        content = preview.to_dict(prepared, setup.tokenizer, rows=rows, packing=packing)
        sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    else:
        out.print(preview.overview(prepared, setup.tokenizer, rows=rows, packing=packing))


@app.command()
def merge(
    run: RunArgument = None,
    output: Annotated[str | None, typer.Option(help="Where to; default: the run's `merged/`.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's.")
    ] = None,
    onto: Annotated[
        str,
        typer.Option(help="`base`, or `dequantized`: the rounded weights a quantized run was trained on."),
    ] = "base",
    as_json: Json = False,
) -> None:
    """Merge a run's adapter into its base: a checkpoint that transformers loads by itself."""
    chosen = run_or_newest(run)
    from mamba_sft.merging.merge_run import merge as merge_run
    from mamba_sft.progress import StageBar

    quiet_loading()
    with StageBar(err) as bar:
        report = merge_run(chosen, output=output, dtype=dtype, onto=onto, progress=bar.update)
    if as_json:
        sys.stdout.write(report.to_json() + "\n")
        return
    _show_merge(report)
    out.print(f"merged: {report.path}")
    out.print(f"next:   mamba-sft chat {report.path}")


def _show_merge(report: MergeReport) -> None:
    check = report.check
    err.print(
        f"{report.changed} of {report.tensors} tensors changed, {_size(report.nbytes)}"
        f" in {report.seconds:.1f} s, peak memory {_size(report.peak_rss)}"
    )
    same = "the same next token" if check.same_next_token else "another next token"
    err.print(
        f"checked on a prompt: logits differ from base + adapter by {check.difference:.1e} of their size"
        f" (at most {check.tolerance:.0e} is rounding), {same}"
    )
    if report.overflowed:
        err.print(f"[yellow]{report.overflowed:,} values are beyond float16 and became infinite[/]")
    for onto, loss in report.losses.items():
        err.print(f"validation loss merged onto {onto}: {loss:.4f}")
    if report.losses_note:
        err.print(f"validation losses not measured: {report.losses_note}")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


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


app.command()(cli_talk.chat)
app.command()(cli_talk.generate)
app.command()(cli_plan.plan)
app.command()(cli_system.doctor)
app.add_typer(cli_system.bench_app, name="bench")
app.command()(cli_export.export)
