"""The verb `chat`."""

from __future__ import annotations

from dataclasses import asdict
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
    err,
    loading,
    model_or_newest,
    out,
    quiet_loading,
)


def chat(
    model: ModelArgument = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="The base's answers beside the tuned model's.")
    ] = False,
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
    no_history: Annotated[bool, typer.Option("--no-history", help="Do not keep what is typed.")] = False,
) -> None:
    """Talk to a run, a model directory, a hub model or a GGUF file.

    Example: mamba-sft chat runs/quickstart --compare
    """
    from mamba_sft.inference.sampling import Sampling
    from mamba_sft.wording import path_text

    stops = tuple(stop_strings or ())
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, repetition_penalty, min_p, stops)
    from mamba_sft.inference.model_places import find_place
    from mamba_sft.inference.request import Running, check_system

    running = Running(device, dtype, quantization, compile_)
    check_system(system, raw=False)
    place = find_place(model_or_newest(model), merged=merged, needs_adapter=compare)
    running.check(place, compare=compare)
    with loading("torch, transformers and peft"):
        from mamba_sft.cli.chat_commands import completions
        from mamba_sft.cli.terminal import chat_loop
        from mamba_sft.cli.typed_lines import TypedLines, history_file
        from mamba_sft.inference.answering import open_session
        from mamba_sft.inference.chat_model import load_chat_model

        quiet_loading()
    talking = load_chat_model(place, **asdict(running), needs_adapter=compare)
    session = open_session(talking, compare=compare, sampling=sampling, system=system)
    history = None if no_history else history_file()
    lines = TypedLines(history, completions, lambda reason: err.print(reason, style="dim"))
    talks = lines.are_typed and out.is_terminal
    kept = path_text(lines.history) if lines.history is not None else None
    if kept is not None and not history_file().exists():
        err.print(f"what you type is kept for the next chat in {kept}; see --no-history", style="dim")
    chat_loop(session, out, lines.read, remember=lines.remember, talks=talks, history=kept)
