"""The talking verbs of the command line: `chat` and `generate`."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mamba_sft.errors import UsageError

if TYPE_CHECKING:
    from mamba_sft.run import Run

out = Console(highlight=False, soft_wrap=True)
"""Data: what a pipe should get."""
err = Console(stderr=True, highlight=False)
"""Everything else."""

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


def chat(
    model: ModelArgument = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and tuned model side by side.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Talk to the run's merged checkpoint.")] = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
) -> None:
    """Talk to a run, a model directory or a hub model; `/help` lists what else it understands."""
    from mamba_sft.inference.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    where = _model_or_newest(model)
    from mamba_sft.inference.answering import chat_loop, open_session

    quiet_loading()
    session = open_session(where, compare=compare, merged=merged, sampling=sampling, system=system)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a pipe may hold anything
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() line editing and history
    chat_loop(session, out, _read_line)


def generate(
    model: ModelArgument = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")
    ] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help="Prompts, one JSON object a line.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="JSON Lines to write; default: print.")
    ] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without the chat template.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
) -> None:
    """Answer prompts: `mamba-sft generate RUN --prompt "..."`, or a file of them."""
    from mamba_sft.inference.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    if (input_file is None) == (not prompt):
        raise UsageError(
            "give either `--prompt` or `--input`", hint='for example --prompt "What is a haiku?"'
        )
    where = _model_or_newest(model)
    from mamba_sft.inference.answering import generate as answer
    from mamba_sft.progress import StageBar
    from mamba_sft.terminal import printable

    quiet_loading()
    prompts: Path | list[str] = input_file if input_file is not None else prompt or []
    with StageBar(err) as bar:
        found = answer(
            where, prompts, output=output, sampling=sampling, system=system, raw=raw, on_answer=bar.count
        )
    if output is None:
        for one in found:
            if out.is_terminal:
                out.print(printable(one.text), markup=False)
            else:
                sys.stdout.write(one.text + "\n")
    else:
        err.print(f"{len(found)} answers: {output}")


def quiet_loading() -> None:
    """Turns off transformers' bar over tensors, which says little and draws over ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _read_line(prompt: str) -> str:
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")
    return input(prompt)


def run_or_newest(run: str | None) -> Run:
    """Returns the run asked for, or the newest one, saying which."""
    from mamba_sft.run import Run

    if run is not None:
        return Run.open(run)
    newest = Run.newest()
    err.print(f"using the newest run: {newest.path}")
    return newest


def _model_or_newest(model: str | None) -> str | Run:
    return model if model is not None else run_or_newest(None)
