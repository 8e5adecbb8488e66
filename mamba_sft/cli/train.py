"""The verb `train`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from mamba_sft.cli.console import Overrides, RecipeArgument, err, loading, out, quiet_loading
from mamba_sft.cli.hub_reach import may_name_the_hub, use_cache_if_unreachable
from mamba_sft.cli.launched import stop_with_launcher
from mamba_sft.cli.printable import printable
from mamba_sft.errors import UsageError
from mamba_sft.wording import count_text

if TYPE_CHECKING:
    from mamba_sft.run import Run
    from mamba_sft.training.first_checks import Checked
    from mamba_sft.training.launching import Launch
    from mamba_sft.training.preparation import Preparation


def train(
    context: typer.Context,
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on exactly where the last checkpoint stopped.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run of the same name.")
    ] = False,
    allow_changed_data: Annotated[
        bool,
        typer.Option("--allow-changed-data", help="Resume though rows or prompts have changed."),
    ] = False,
    finish: Annotated[
        bool, typer.Option("--finish", help="With --resume: take no step more, end at the last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, stop before the weights.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Start so many processes with torchrun, one for each GPU.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(metavar="N", help="Machines, each with as many `--processes`.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Which of the `--nodes` this is, from 0.")
    ] = None,
    master: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where `--nodes` meet: the machine of rank 0.")
    ] = None,
) -> None:
    """Fine-tune a base model as a recipe says.

    Example: mamba-sft train quickstart train.max_steps=20
    """
    from mamba_sft.recipe.recipe import Recipe
    from mamba_sft.recipe.yaml_text import overridden
    from mamba_sft.training.launching import asked_launch
    from mamba_sft.training.overwriting import refuse_both

    launch = asked_launch(processes, nodes, rank, master)
    refuse_both(resume=resume, overwrite=overwrite, finish=finish)
    if allow_changed_data and not resume:
        raise UsageError("`--allow-changed-data` goes with `--resume`", hint="a new run takes any data")
    changes = overrides or []
    loaded = Recipe.load(recipe, overrides=changes)
    if may_name_the_hub(source.path for source in loaded.data.sources):
        use_cache_if_unreachable()
    from mamba_sft.recipe.builtin import find_recipe
    from mamba_sft.training.first_checks import check_first
    from mamba_sft.training.resuming import own_recipe_moved

    if resume and "output_dir" not in overridden(changes):
        loaded = own_recipe_moved(find_recipe(recipe), loaded)
    replaces = overwrite or (dry_run and not resume)  # a dry run asks what a run would do
    writes = launch is None or launch.rank == 0
    checked = check_first(loaded, resume=resume, overwrite=replaces, finish=finish, writes=writes)
    if launch is not None:
        flags = {
            "--resume": resume,
            "--overwrite": overwrite,
            "--allow-changed-data": allow_changed_data,
            "--finish": finish,
            "--dry-run": dry_run,
        }
        words = ["train", recipe, *changes, *(flag for flag, given in flags.items() if given)]
        if (context.find_root().params or {}).get("verbose"):
            words.insert(0, "--verbose")
        _start_processes(launch, words, checked)
        return
    stop_with_launcher(loaded.train.grace_seconds)
    with loading("torch, transformers, peft and trl"):
        from mamba_sft.cli.lines import WarningList
        from mamba_sft.cli.progress import TrainingBar
        from mamba_sft.cli.unsaved import ask_on_terminal
        from mamba_sft.data.summary import FITS_NO_CHAT
        from mamba_sft.training.fine_tuning import train_prepared
        from mamba_sft.training.preparation import prepare_checked

    preparation = prepare_checked(checked, allow_changed_data=allow_changed_data)
    fits_no_chat = preparation.data.summary.fits_no_chat
    if dry_run:
        _show_dry_run(preparation)
        return
    quiet_loading()
    if warnings := [FITS_NO_CHAT] * fits_no_chat + preparation.length.warnings():
        err.print(WarningList(warnings), crop=False)
    bar = TrainingBar(err)
    try:
        run = train_prepared(preparation, callbacks=[bar], ask=ask_on_terminal())
    finally:
        bar.close()
    _show_samples(run, fits_no_chat)
    _show_end(run, "merge" if loaded.trains == "adapter" else "export")


def _show_end(run: Run, then: str) -> None:
    from mamba_sft.cli.lines import WarningList
    from mamba_sft.evaluation.losses import loss_warnings

    if warnings := loss_warnings(run.read_metrics()):
        err.print(WarningList(warnings), crop=False)
    out.print(f"trained: {run.path}  (report: {run.report})")
    place = shlex.quote(str(run.path))
    out.print(f"next:    mamba-sft chat {place}   or   mamba-sft {then} {place}")


def _start_processes(launch: Launch, words: list[str], checked: Checked) -> None:
    from mamba_sft.training import launching

    grace = checked.recipe.train.grace_seconds
    with loading("torch"):
        launching.refuse_impossible(launch, grace)
    launching.launch(launch, words, checked.run, grace)


def _show_dry_run(preparation: Preparation) -> None:
    from mamba_sft.cli.preview import statistics

    summary, length = preparation.data.summary, preparation.length
    packing = preparation.data.packing
    err.print(statistics(summary, packing, length, preparation.record.get("mixture")), crop=False)
    rows = f"{summary.train_rows:,} rows to train on"
    if packing:
        rows += f", packed into {length.rows:,}"
    if length.chosen:
        rows += f"; train.gradient_accumulation_steps is left out, so {length.accumulation}"
    out.print(
        f"{rows}; {count_text(length.steps, 'step')}; all is well before the weights;"
        f" without `--dry-run` this trains into {preparation.run.path}"
    )


def _show_samples(run: Run, fits_no_chat: bool, rows: int = 6) -> None:
    from mamba_sft.cli.lines import WarningList
    from mamba_sft.evaluation.prompts import exact_match, read_samples, score_name
    from mamba_sft.evaluation.run_figures import in_sight, sample_titles, samples_heading, wrong_first

    samples = read_samples(run.samples_file)
    if not samples:
        return
    titles = sample_titles(run.read_data())
    known = any(sample.prompt.answer is not None for sample in samples)
    heading = samples_heading(min(rows, len(samples)), len(samples))
    table = Table(title=f"sample answers: {heading}", show_lines=True, expand=True)
    for title in ("prompt", *(["expected"] if known else []), *titles):
        table.add_column(title, ratio=3, overflow="fold")
    for sample in in_sight(wrong_first(samples, titles), rows):
        expected = [_short(sample.prompt.answer or "")] if known else []
        given = (_marked(text, right) for _, text, right in sample.answers)
        table.add_row(_short(sample.prompt.prompt), *expected, *given)
    err.print(table)
    prompts = [sample.prompt for sample in samples]
    before = exact_match(prompts, [sample.before for sample in samples])
    after = exact_match(prompts, [sample.after for sample in samples])
    if before is not None and after is not None:
        count = sum(prompt.is_scored for prompt in prompts)
        scored = f"{score_name(prompts)} on {count} held-out prompts"
        out.print(f"{scored}: {before:.1%} before, {after:.1%} after")
    if fits_no_chat:
        note = "these prompts went through the chat template, which no trained row did"
        err.print(WarningList([note]), crop=False)


def _marked(text: str, right: bool | None) -> Text:
    from mamba_sft.evaluation.run_figures import MARKS

    return Text(MARKS[right] + printable(_short(text)), "" if right is None else "green" if right else "red")


def _short(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
