"""The verb `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mamba_sft.cli import completing
from mamba_sft.cli.console import err, out, run_or_newest
from mamba_sft.cli.lines import WarningList
from mamba_sft.errors import MambaSFTError, UsageError


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="A run, or several to compare; default: the newest.",
            autocompletion=completing.runs,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="PAGE", help="The page that compares; default: comparison.html beside the first run."
        ),
    ] = None,
) -> None:
    """Write a run's report anew, or compare several runs.

    Example: mamba-sft report runs/a runs/b
    """
    from mamba_sft.evaluation.comparison import check_comparison_place, default_place, write_comparison
    from mamba_sft.evaluation.report import write_report
    from mamba_sft.wording import path_text

    chosen = [run_or_newest(name) for name in runs] if runs else [run_or_newest(None)]
    if len({run.path.resolve() for run in chosen}) < len(chosen):
        raise UsageError("the same run twice", hint="name each run once")
    if output is not None and len(chosen) == 1:
        raise UsageError("`--output` is for a comparison, and there is one run", hint="name two runs or more")
    place = Path(output) if output is not None else default_place(chosen)
    try:
        if len(chosen) > 1:
            check_comparison_place(place)
        for run in chosen:
            if problems := write_report(run):
                err.print(WarningList([f"{run.path}: {problem}" for problem in problems]), crop=False)
            out.print(f"report:     {run.report}  (as text: {run.report_text.name})")
        if len(chosen) > 1:
            write_comparison(chosen, place)
            out.print(f"comparison: {path_text(place)}")
    except OSError as error:
        where = error.filename or place
        raise MambaSFTError(
            f"cannot write the report: `{where}`: {error.strerror or error}",
            hint="free space or permission is missing there; a comparison goes elsewhere with `--output`",
        ) from error
