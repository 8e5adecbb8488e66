"""The verb `chat`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from io import TextIOWrapper
from typing import Annotated

import typer

from mamba_sft.cli.console import (
    Compile,
    Device,
    Dtype,
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
    loading,
    model_or_newest,
    out,
    quiet_loading,
)


def chat(
    model: ModelArgument = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and tuned model side by side.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Talk to the run's merged checkpoint.")] = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
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
    """Talk to a run, a model directory, a hub model or a GGUF file.

    Example: mamba-sft chat runs/quickstart --compare
    """
    from mamba_sft.inference.sampling import Sampling

    stops = tuple(stop_strings or ())
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, repetition_penalty, min_p, stops)
    from mamba_sft.inference.model_places import find_place
    from mamba_sft.inference.request import Running

    running = Running(device, dtype, quantization, compile_)
    place = find_place(model_or_newest(model), merged=merged, needs_adapter=compare)
    running.check(place, compare=compare)
    with loading("torch, transformers and peft"):
        from mamba_sft.cli.terminal import chat_loop
        from mamba_sft.inference.answering import open_session
        from mamba_sft.inference.chat_model import load_chat_model

        quiet_loading()
    talking = load_chat_model(place, **asdict(running), needs_adapter=compare)
    session = open_session(talking, compare=compare, sampling=sampling, system=system)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a pipe may hold anything
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() line editing and history
    chat_loop(session, out, _read_line)


def _read_line(prompt: str) -> str:
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")
    return input(prompt)
