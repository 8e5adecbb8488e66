"""The verb `generate`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mamba_sft.cli.console import (
    Json,
    MaxNewTokens,
    ModelArgument,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    err,
    loading,
    model_or_newest,
    out,
    quiet_loading,
    write_json_lines,
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
    as_json: Json = False,
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
    if as_json and output is not None:
        raise UsageError("`--output` writes JSON Lines already", hint="leave out `--json`")
    _refuse_file_names(prompt or [])
    from mamba_sft.inference.model_places import find_place
    from mamba_sft.inference.request import check_files

    check_files(input_file, output)
    place = find_place(model_or_newest(model))
    with loading("torch, transformers and peft"):
        from mamba_sft.cli.progress import StageBar
        from mamba_sft.inference.answer_file import answer_row
        from mamba_sft.inference.answering import answer_prompts, read_prompts

        quiet_loading()
    rows = read_prompts(input_file if input_file is not None else prompt or [])
    with StageBar(err) as bar:
        found = answer_prompts(
            place, rows, output=output, sampling=sampling, system=system, raw=raw, on_answer=bar.count
        )
    if as_json:
        write_json_lines(answer_row(asked, one) for (_, asked), one in zip(rows, found, strict=True))
    elif output is None:
        for one in found:
            if out.is_terminal:
                out.print(one.text)
            else:
                sys.stdout.write(one.text + "\n")
    else:
        err.print(f"{len(found)} answers: {output}")


def _refuse_file_names(prompts: list[str]) -> None:
    for text in prompts:
        if text.endswith((".txt", ".jsonl", ".json")) and os.path.isfile(text):
            raise UsageError(
                f"`--prompt {text}`: that is a file; a prompt is the text itself",
                hint=f"`--input {shlex.quote(text)}` answers the prompts in it",
            )
