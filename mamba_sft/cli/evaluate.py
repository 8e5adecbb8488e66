"""The verb `eval`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mamba_sft.cli import completing
from mamba_sft.cli.console import (
    Json,
    err,
    loading,
    model_or_newest,
    out,
    quiet_loading,
    write_json,
)
from mamba_sft.cli.hub_reach import use_cache_if_unreachable
from mamba_sft.errors import UsageError

if TYPE_CHECKING:
    from mamba_sft.evaluation.measuring import Subject, Work
    from mamba_sft.evaluation.results import Results
    from mamba_sft.evaluation.settings import Settings
    from mamba_sft.evaluation.suites import Problem, Suite
    from mamba_sft.evaluation.table import Table


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|MODEL]",
            help="A run, model directory or hub id; default: the newest.",
            autocompletion=completing.models,
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="What to score on; several with commas.",
            autocompletion=completing.suites,
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B:5,...", help="Tasks of lm-eval, YAML files; `:5` gives shots.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Score this one too and compare; `auto`: the base.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare with the results in this file.")
    ] = None,
    chat_template: Annotated[
        str, typer.Option(metavar="HOW", help="`on` asks in chats, `off` in plain text.")
    ] = "auto",
    max_length: Annotated[int, typer.Option(metavar="N", help="Prompt and answer, in tokens.")] = 2048,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Requests at a time.", hidden=True)] = 8,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only so many documents of each task.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE", help="What to compute in.", hidden=True, autocompletion=completing.dtypes
        ),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(metavar="HOW", help="none, nf4 or int8; default: as it was trained.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="For heldout and instructions: rows, prompts.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where data sets are, as DIR/owner/name.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Files of tasks of your own.", hidden=True)
    ] = None,
    math_metric: Annotated[
        str, typer.Option(metavar="original|verify", help="How answers of MATH are compared.", hidden=True)
    ] = "original",
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results go; default: the run's `eval/`.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished task.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results.", hidden=True)] = False,
    check: Annotated[bool, typer.Option("--check", help="Only say what would stand in the way.")] = False,
    save_samples: Annotated[
        bool, typer.Option("--save-samples", help="Keep what was asked and answered.", hidden=True)
    ] = False,
    as_json: Json = False,
) -> None:
    """Score a model on leaderboards and tasks, beside its base.

    Example: mamba-sft eval runs/quickstart --suite leaderboard-v2 --base auto
    Also: --overwrite, --save-samples, --dtype DTYPE, --math-metric original|verify,
    --batch-size N, --include-path DIR of tasks.
    """
    os.environ.setdefault(
        "TQDM_DISABLE", "1"
    )  # before tqdm is imported: lm-eval draws a bar a task over ours
    from mamba_sft.evaluation.settings import Settings

    settings = Settings(
        chat_template=chat_template,  # type: ignore[arg-type]  # it refuses other words itself
        max_length=max_length,
        batch_size=batch_size,
        limit=limit,
        math_metric=math_metric,  # type: ignore[arg-type]
        data_dir=_absolute(data_dir),
        include_path=_absolute(include_path),
        samples=save_samples,
        rows=data,
    )
    from mamba_sft.evaluation.preflight import check_asked
    from mamba_sft.evaluation.suite_names import asked_suites

    suites = asked_suites(suite, tasks)
    check_asked(suites, settings, resume=resume, overwrite=overwrite)
    if base is not None and against is not None:
        raise UsageError("`--base` scores another model, `--against` reads its results", hint="give one")
    if any(each.name not in ("heldout", "instructions") for each in suites):  # whose data are of the hub
        use_cache_if_unreachable()
    chosen = model_or_newest(model)
    from mamba_sft.run import evaluation_place

    place_of_results = output if output is not None else evaluation_place(chosen)
    from mamba_sft.evaluation.measuring import find_subjects

    subjects, problems = find_subjects(chosen, base, dtype=dtype, quantization=quantization)
    earlier = _read_against(against, suites)
    works = _prepare(suites, subjects, problems, settings, place_of_results, check, resume, overwrite)
    if works is None:
        out.print("nothing stands in the way")
        return
    _measure(works, subjects, settings, quantization)
    _compare(works, earlier)
    if output is None:
        from mamba_sft.evaluation.report import refresh_report

        refresh_report(chosen)
    if as_json:
        write_json([_as_json(work) for work in works])
    else:
        _show(works)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser().absolute()


def _read_against(file: Path | None, suites: Sequence[Suite]) -> Results | None:
    from mamba_sft.evaluation.results import Results

    found = None if file is None else Results.read(file)
    if found is not None and all(suite.name != found.suite for suite in suites):
        raise UsageError(
            f"`{file}` has results of {found.suite}: nothing to compare {suites[0].name} with",
            hint="name a file of the same suite, or of the same tasks and shots",
        )
    return found


def _prepare(
    suites: Sequence[Suite],
    subjects: Sequence[Subject],
    problems: list[Problem],
    settings: Settings,
    output: Path,
    check: bool,
    resume: bool,
    overwrite: bool,
) -> list[Work] | None:
    """Looks for all problems, then reads what is asked; returns what is to be done, None for a check."""
    from mamba_sft.evaluation.measuring import start_all
    from mamba_sft.evaluation.preflight import problems_of, refuse

    with loading("lm-eval and its tasks"):
        problems += problems_of(suites, [one.place for one in subjects], settings, output)
    refuse(problems)
    from mamba_sft.cli.progress import StageBar  # which loads transformers

    with StageBar(err) as bar:
        works = start_all(
            suites, subjects, settings, output, resume=resume, overwrite=overwrite, progress=bar.update
        )
    return None if check else works


def _measure(
    works: Sequence[Work], subjects: Sequence[Subject], settings: Settings, quantization: Any
) -> None:
    with loading("torch, transformers and peft"):
        from mamba_sft.cli.progress import StageBar, TaskBar
        from mamba_sft.evaluation.measuring import measure

        quiet_loading()
    with StageBar(err) as drawn:
        bar = TaskBar(drawn, sum(len(work.todo(one.role)) for work in works for one in subjects))
        measure(works, subjects, settings, quantization=quantization, progress=bar.update)
        bar.end()


def _compare(works: Sequence[Work], earlier: Results | None) -> None:
    from mamba_sft.evaluation.measuring import compare

    for work in works:
        if earlier is not None and earlier.suite != work.suite.name:
            err.print(
                f"`--against` has results of {earlier.suite}: nothing to compare {work.suite.name} with"
            )
            compare(work)
        else:
            compare(work, earlier)


def _as_json(work: Work) -> dict[str, Any]:
    return {role: one.to_json(documents=False) for role, one in work.results.items()}


def _show(works: Sequence[Work]) -> None:
    from mamba_sft.evaluation.table import differences_table, notes, scores_table, settings_text
    from mamba_sft.wording import path_text

    for work in works:
        rows = list(work.results.values())
        if work.against is not None and "base" not in work.results:
            work.against.fill(work.suite.columns())
            rows.insert(0, work.against)
        out.print(settings_text(work.results["tuned"]))
        _print_table(scores_table(rows, work.suite.published))
        if work.against is not None:
            out.print()
            names = work.against.model["name"], work.results["tuned"].model["name"]
            _print_table(differences_table(*names, work.differences))
        for note in notes(rows, work.differences):
            err.print(note, soft_wrap=True)
        for file in work.files.values():
            out.print(f"results: {path_text(file)}")


def _print_table(table: Table) -> None:
    widths = [max(len(row[i]) for row in (table.titles, *table.rows)) for i in range(len(table.titles))]
    texts = {0} | {i for i, title in enumerate(table.titles) if title == "metric"}
    for row in (table.titles, *table.rows):
        cells = [
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        out.print("  ".join(cells).rstrip(), crop=False)
