"""The verb `generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mamba_sft.cli.console import (
    MaxNewTokens,
    ModelArgument,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    err,
    model_or_newest,
    out,
    quiet_loading,
)
from mamba_sft.errors import UsageError


def generate(
    model: ModelArgument = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt; may be repeated.")
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="Prompts: JSON Lines, or a .txt with one a line."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="JSON Lines to write; default: print.")
    ] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without the chat template.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
) -> None:
    """Answer prompts, given one by one or in a file.

    Example: mamba-sft generate runs/quickstart -p "What is the opposite of hot?"
    """
    from mamba_sft.inference.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    if (input_file is None) == (not prompt):
        raise UsageError(
            "give either `--prompt` or `--input`", hint='for example --prompt "What is a haiku?"'
        )
    where = model_or_newest(model)
    from mamba_sft.cli.progress import StageBar
    from mamba_sft.inference.answering import generate as answer

    quiet_loading()
    prompts: Path | list[str] = input_file if input_file is not None else prompt or []
    with StageBar(err) as bar:
        found = answer(
            where, prompts, output=output, sampling=sampling, system=system, raw=raw, on_answer=bar.count
        )
    if output is None:
        for one in found:
            if out.is_terminal:
                out.print(one.text)
            else:
                sys.stdout.write(one.text + "\n")
    else:
        err.print(f"{len(found)} answers: {output}")
