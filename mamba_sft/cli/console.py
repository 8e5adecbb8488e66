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
from mamba_sft.noise import quiet_loading as quiet_loading  # noqa: PLC0414  # for the verbs

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
        help="A run, model, hub id or GGUF; default: newest.",
        autocompletion=completing.models,
    ),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message; default: the trained one.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Longest answer, in tokens.")]

# Options of one panel stand in one row of the help page, with the panel's text.
_SAMPLED = "0: the likeliest token; above 0: sampled"
_LIKELY = "Sample from likely tokens only; default: all"
_WHERE = "cpu, cuda or auto; float32, bfloat16, ..."
Temperature = Annotated[
    float,
    typer.Option(metavar="X", rich_help_panel=_SAMPLED, help="0: the likeliest token; above 0 it samples."),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=_SAMPLED, help="Makes sampling repeatable.")
]
TopP = Annotated[
    float,
    typer.Option(metavar="X", rich_help_panel=_LIKELY, help="Sample from tokens of this much probability."),
]
TopK = Annotated[
    int,
    typer.Option(metavar="N", rich_help_panel=_LIKELY, help="Sample from so many likeliest tokens; 0: all."),
]
MinP = Annotated[
    float,
    typer.Option(metavar="X", rich_help_panel=_LIKELY, help="Sample from tokens this near the likeliest."),
]
RepetitionPenalty = Annotated[float, typer.Option(metavar="X", help="Above 1: fewer tokens said before.")]
StopStrings = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Ends the answer; may be repeated.")
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        rich_help_panel=_WHERE,
        help="Where it runs.",
        autocompletion=completing.devices,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=_WHERE,
        help="What it computes in; default: as trained, or as stored.",
        autocompletion=completing.computed_in,
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="nf4, int8 or none; default: as trained.",
        autocompletion=completing.held_as,
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Have torch.compile make a token's step.")]

_NOT_IN_JSON = re.compile(r"[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def write_json(content: Any) -> None:
    """Writes JSON to stdout: letters as they are, what would steer a terminal or is no character escaped."""
    sys.stdout.write(_json(content, indent=2))


def write_json_lines(rows: Iterable[Any]) -> None:
    """Writes JSON to stdout, one value a line, in the same form; each is out when the next is asked for."""
    for row in rows:
        sys.stdout.write(_json(row))
        sys.stdout.flush()


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
