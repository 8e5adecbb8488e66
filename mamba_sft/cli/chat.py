"""The verb `chat`."""

from __future__ import annotations

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
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Do not keep what is typed for the next chat.")
    ] = False,
) -> None:
    """Talk to a run, a model directory or a hub model.

    Example: mamba-sft chat runs/quickstart --compare
    """
    from mamba_sft.inference.sampling import Sampling
    from mamba_sft.wording import path_text

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    from mamba_sft.inference.model_places import find_place

    place = find_place(model_or_newest(model), merged=merged, needs_adapter=compare)
    with loading("torch, transformers and peft"):
        from mamba_sft.cli.chat_commands import completions
        from mamba_sft.cli.terminal import chat_loop
        from mamba_sft.cli.typed_lines import TypedLines, history_file
        from mamba_sft.inference.answering import open_session

        quiet_loading()
    session = open_session(place, compare=compare, sampling=sampling, system=system)
    history = None if no_history else history_file()
    lines = TypedLines(history, completions, lambda reason: err.print(reason, style="dim"))
    talks = lines.are_typed and out.is_terminal
    kept = path_text(lines.history) if lines.history is not None else None
    if kept is not None and not history_file().exists():
        err.print(f"what you type is kept for the next chat in {kept}; see --no-history", style="dim")
    chat_loop(session, out, lines.read, remember=lines.remember, talks=talks, history=kept)
