"""The verb `report`."""

from __future__ import annotations

from typing import Annotated

import typer

from mamba_sft.cli import completing
from mamba_sft.cli.console import err, out, run_or_newest
from mamba_sft.cli.lines import WarningList


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
    from mamba_sft.evaluation.comparison import (
        asked_place,
        check_comparison_place,
        report_errors_explained,
        write_comparison,
    )
    from mamba_sft.evaluation.report import write_report
    from mamba_sft.wording import path_text

    chosen = [run_or_newest(name) for name in runs] if runs else [run_or_newest(None)]
    place = asked_place(chosen, output, "--output")
    with report_errors_explained(place, "--output"):
        if len(chosen) > 1:
            check_comparison_place(place)
        for run in chosen:
            if problems := write_report(run):
                err.print(WarningList([f"{run.path}: {problem}" for problem in problems]), crop=False)
            out.print(f"report:     {run.report}  (as text: {run.report_text.name})")
        if len(chosen) > 1:
            write_comparison(chosen, place)
            out.print(f"comparison: {path_text(place)}")
