"""Where output goes, and what several verbs share: data to stdout, everything else to stderr.

Nothing outside this room holds a console.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from mamba_sft.run import Run

out = Console(highlight=False, soft_wrap=True)
"""Data: what a pipe should get."""
err = Console(stderr=True, highlight=False)
"""Everything else."""

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a built-in one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.field=value]...", help="Changes to the recipe's values."),
]
FinishedRun = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="A run directory; default: the newest.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN|MODEL]", help="A run, a model directory or a hub id; default: the newest run."
    ),
]
System = Annotated[str | None, typer.Option(help="System message; default: the one trained with.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.")]
TopP = Annotated[float, typer.Option(help="Sample from the fewest tokens with this much probability.")]
TopK = Annotated[int, typer.Option(help="Sample from this many of the likeliest tokens; 0: all.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Returns `text` without the control characters that would steer a terminal; rich keeps escapes."""
    return _CONTROL.sub("", text)


def quiet_loading() -> None:
    """Turns off transformers' bar over tensors, which says little and draws over ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def run_or_newest(run: str | None) -> Run:
    """Returns the run asked for, or the newest one, saying which."""
    from mamba_sft.run import Run

    if run is not None:
        return Run.open(run)
    newest = Run.newest()
    err.print(f"using the newest run: {newest.path}")
    return newest


def model_or_newest(model: str | None) -> str | Run:
    """Returns the model asked for, or the newest run, saying which."""
    return model if model is not None else run_or_newest(None)
