"""Where output goes, and what several verbs share: data to stdout, everything else to stderr.

Nothing outside this room holds a console.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.control import Control
from rich.segment import ControlType

from mamba_sft.cli import completing
from mamba_sft.cli.printable import PrintableConsole

if TYPE_CHECKING:
    from mamba_sft.run import Run

out = PrintableConsole(soft_wrap=True)
"""Data: what a pipe should get."""
err = PrintableConsole(stderr=True)
"""Everything else."""

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a built-in one.",
        autocompletion=completing.recipes,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.field=value]...",
        help="Changes to the recipe's values.",
        autocompletion=completing.overrides,
    ),
]
FinishedRun = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]", help="A run directory; default: the newest.", autocompletion=completing.runs
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN|MODEL]",
        help="A run, a model directory or a hub id; default: the newest.",
        autocompletion=completing.models,
    ),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System message; default: the one trained with.")
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(metavar="X", help="0: the likeliest token; above 0 it samples.")]
TopP = Annotated[float, typer.Option(metavar="X", help="Sample from tokens of this much probability.")]
TopK = Annotated[int, typer.Option(metavar="N", help="Sample from so many likeliest tokens; 0: all.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Makes sampling repeatable.")]

_NOT_IN_JSON = re.compile(r"[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def write_json(content: Any) -> None:
    """Writes JSON to stdout: letters as they are, what would steer a terminal or is no character escaped."""
    sys.stdout.write(_json(content, indent=2))


def write_json_lines(rows: Iterable[Any]) -> None:
    """Writes JSON to stdout, one value a line, in the same form."""
    for row in rows:
        sys.stdout.write(_json(row))


def _json(content: Any, indent: int | None = None) -> str:
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    return _NOT_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


@contextmanager
def loading(libraries: str) -> Iterator[None]:
    """Says which libraries are being loaded, on a terminal, in a line that goes again: it takes seconds.

    Everything that can be told without them is told before.
    """
    if err.is_terminal:
        err.print(f"loading {libraries} ...", style="dim", end="")
    try:
        yield
    finally:
        if err.is_terminal:
            err.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))


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
