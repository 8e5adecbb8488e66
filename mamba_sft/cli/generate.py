"""The verb `generate`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mamba_sft.cli.console import (
    Compile,
    Device,
    Dtype,
    Json,
    MaxNewTokens,
    MinP,
    ModelArgument,
    Quantization,
    RepetitionPenalty,
    Seed,
    StopStrings,
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
from mamba_sft.wording import count_text

if TYPE_CHECKING:
    from mamba_sft.inference.answer import Answer
    from mamba_sft.inference.answer_file import AnswerFile
    from mamba_sft.inference.prompt_rows import PromptRow


def generate(
    model: ModelArgument = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt; may be repeated.")
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="Prompts: JSON Lines, or .txt, one a line."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="JSON Lines to write; default: print.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the answers of an unfinished output.")
    ] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Prompts answered together.")] = 8,
    as_json: Json = False,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop_strings: StopStrings = None,
    device: Device = "auto",
    dtype: Dtype = None,
    quantization: Quantization = None,
    compile_: Compile = False,
) -> None:
    """Answer prompts, given one by one or in a file.

    Example: mamba-sft generate runs/quickstart -p "What is the opposite of hot?"
    """
    from mamba_sft.inference.sampling import Sampling

    stops = tuple(stop_strings or ())
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, repetition_penalty, min_p, stops)
    if (input_file is None) == (not prompt):
        raise UsageError(
            "give either `--prompt` or `--input`", hint='for example --prompt "What is a haiku?"'
        )
    if as_json and output is not None:
        raise UsageError("`--output` writes JSON Lines already", hint="leave out `--json`")
    if resume and output is None:
        raise UsageError("`--resume` goes on with an `--output`", hint="say which, or leave `--resume` out")
    if batch_size < 1:
        raise UsageError(f"`batch_size` must be at least 1, not {batch_size}")
    _refuse_file_names(prompt or [])
    from mamba_sft.inference.model_places import find_place
    from mamba_sft.inference.prompt_rows import read_prompts
    from mamba_sft.inference.request import Running, check_files, check_system

    running = Running(device, dtype, quantization, compile_)
    check_system(system, raw=raw)
    check_files(input_file, output)
    rows = read_prompts(input_file if input_file is not None else prompt or [])
    place = find_place(model_or_newest(model))
    running.check(place)
    file = None
    if output is not None:
        from mamba_sft.inference.answer_file import AnswerFile
        from mamba_sft.inference.unfinished import asked_of, identity_of

        file = AnswerFile(output, resume=resume)
        if resume:
            file.start(rows, asked_of(identity_of(place, running), sampling, system, raw))
            _tell_kept(file, len(rows))
    with loading("torch, transformers and peft"):
        from mamba_sft.cli.answers import AnswerBar, InOrder
        from mamba_sft.inference.answering import answer_prompts
        from mamba_sft.inference.chat_model import load_chat_model

        quiet_loading()
    talking = load_chat_model(place, **asdict(running), needs_template=not raw)
    show = None if output is not None else InOrder(_writer(rows, as_json=as_json))
    kept = set(file.found) if file is not None else set()
    with AnswerBar(err, len(rows), shown=show is None or not out.is_terminal) as bar:

        def take(number: int, answer: Answer) -> None:
            bar.count(number, answer, kept=number in kept)
            if show is not None:
                show(number, answer)

        found = answer_prompts(
            talking, rows, output=file, sampling=sampling, system=system, raw=raw, batch_size=batch_size,
            on_answer=take,
        )  # fmt: skip
    if output is not None:
        err.print(f"{count_text(len(found), 'answer')}: {output}")


def _writer(rows: Sequence[PromptRow], *, as_json: bool) -> Callable[[int, Answer], None]:
    """What writes one answer to stdout."""
    from mamba_sft.inference.answer import answer_row

    def write(number: int, answer: Answer) -> None:
        if as_json:
            write_json_lines([answer_row(rows[number], answer)])
        elif out.is_terminal:
            out.print(answer.text)
        else:
            sys.stdout.write(answer.text + "\n")
            sys.stdout.flush()

    return write


def _tell_kept(file: AnswerFile, count: int) -> None:
    if file.found:
        err.print(f"{len(file.found)} of {count} answers are there already")
    else:
        err.print(f"nothing of {file.path} is there yet: it begins with the first prompt")


def _refuse_file_names(prompts: list[str]) -> None:
    for text in prompts:
        if text.endswith((".txt", ".jsonl", ".json")) and os.path.isfile(text):
            raise UsageError(
                f"`--prompt {text}`: that is a file; a prompt is the text itself",
                hint=f"`--input {shlex.quote(text)}` answers the prompts in it",
            )
