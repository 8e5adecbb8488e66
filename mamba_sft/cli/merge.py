"""The verb `merge`."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mamba_sft.cli import completing
from mamba_sft.cli.console import FinishedRun, Json, err, loading, out, quiet_loading, run_or_newest
from mamba_sft.wording import size_text, time_text

if TYPE_CHECKING:
    from mamba_sft.merging.check import MergeResult


def merge(
    run: FinishedRun = None,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where to; default: the run's `merged/`.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="float32, bfloat16 or float16; default: the base's.",
            autocompletion=completing.dtypes,
        ),
    ] = None,
    onto: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="base, or dequantized: the rounded weights that a QLoRA was trained on.",
            autocompletion=completing.merge_bases,
        ),
    ] = "base",
    as_json: Json = False,
) -> None:
    """Merge a run's adapter into its base: a checkpoint of its own.

    Example: mamba-sft merge runs/quickstart
    """
    chosen = run_or_newest(run)
    from mamba_sft.merging.request import check_request

    check_request(chosen, output=output, dtype=dtype, onto=onto)
    with loading("torch, transformers and peft"):
        from mamba_sft.cli.progress import StageBar
        from mamba_sft.merging.merge_run import merge as merge_run

        quiet_loading()
    with StageBar(err) as bar:
        report = merge_run(chosen, output=output, dtype=dtype, onto=onto, progress=bar.update)
    if as_json:
        sys.stdout.write(report.to_json() + "\n")
        return
    _show_merge(report)
    out.print(f"merged: {report.path}")
    out.print(f"next:   mamba-sft chat {shlex.quote(str(report.path))}")


def _show_merge(report: MergeResult) -> None:
    check = report.check
    err.print(
        f"{report.changed} of {report.tensors} tensors changed, {size_text(report.nbytes)}"
        f" in {time_text(report.seconds)}, peak memory {size_text(report.peak_rss)}"
    )
    same = "the same next token" if check.same_next_token else "another next token"
    err.print(
        f"checked on a prompt: logits differ from base + adapter by {check.difference:.1e} of their size"
        f" (at most {check.tolerance:.0e} is rounding), {same}"
    )
    if report.overflowed:
        err.print(f"{report.overflowed:,} values are beyond float16 and became infinite", style="yellow")
    for onto, loss in report.losses.items():
        err.print(f"validation loss merged onto {onto}: {loss:.4f}")
    if report.losses_note:
        err.print(f"validation losses not measured: {report.losses_note}")
