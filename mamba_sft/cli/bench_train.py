"""The verb `bench train`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from mamba_sft.cli.console import Json, Overrides, RecipeArgument, out, write_json
from mamba_sft.cli.measured import OutputFile, machine_line, write_result
from mamba_sft.cli.output_files import check_output_file
from mamba_sft.wording import size_text, time_text


def bench_train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Optimizer steps that are counted.")] = 5,
    peer: Annotated[
        bool, typer.Option("--peer/--no-peer", help="Leave out stock transformers and PEFT.")
    ] = True,
    peer_seconds: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="When these are stopped.")
    ] = 120,
    output: OutputFile = None,
    as_json: Json = False,
) -> None:
    """Measure a recipe's training steps, and stock ones beside them.

    Example: mamba-sft bench train quickstart --steps 5

    Takes steps on the recipe's own rows, or on made-up ones of its length, and then the same steps with stock
    transformers and PEFT. Writes nothing into `output_dir`.
    """
    from mamba_sft.recipe.recipe import Recipe

    loaded = Recipe.load(recipe, overrides=overrides or [])
    check_output_file(output, ".json", "--output")
    from mamba_sft.diagnostics.training_benchmark import measure_training

    result = measure_training(loaded, steps=steps, peer=peer, peer_seconds=peer_seconds)
    write_result(result, output)
    if as_json:
        write_json(result)
        return
    for part in rendered(result):
        out.print(part, soft_wrap=not isinstance(part, Table))


def rendered(result: dict[str, Any]) -> Iterator[Table | Text | str]:
    """Yields the machine, a table of the steps, and how they compare, ready to be printed by rich."""
    yield machine_line(result["machine"])
    yield _rows(result)
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(("", "tokens/s", "least to most", "a step", "peak memory")):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    sides = [result["ours"], *([result["peer"]] if result["peer"] else [])]
    for side in sides:
        table.add_row(side["of"], *_cells(side))
    yield ""
    yield table
    yield ""
    yield from _comparison(result)
    yield from _plan(result)


def _rows(result: dict[str, Any]) -> str:
    rows = result["rows"]
    kind = "made-up rows" if rows["made_up"] else "the recipe's rows"
    length = "" if rows["max_length"] is None else f" of at most {rows['max_length']:,} tokens"
    steps = f"{rows['tokens_per_step']:,.0f} tokens a step, {result['settings']['warm_up']} steps to warm up"
    return f"{kind}{length}, {rows['batch_size']} at once; {steps}"


def _cells(side: dict[str, Any]) -> list[str]:
    peak = "-" if side["peak_bytes"] is None else size_text(side["peak_bytes"])
    if side["tokens_per_second"] is None:
        return ["-", "-", "-", peak]
    low, high = side["tokens_per_second_range"]
    step = "-" if side["seconds_per_step"] is None else _step_time(side["seconds_per_step"])
    return [f"{side['tokens_per_second']:,.0f}", f"{low:,.0f} to {high:,.0f}", step, peak]


def _step_time(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else time_text(seconds)


def _comparison(result: dict[str, Any]) -> Iterator[str]:
    peer = result["peer"]
    if peer is None:
        return
    if result["times_peer"]:
        memory = f", in {result['peak_of_peer']:.2f} of its memory" if result["peak_of_peer"] else ""
        yield f"{result['times_peer']:.1f} times as fast as {peer['of']}{memory}"
    if result["times_peer_in_cpu_time"] and "cpu" in result["machine"]:
        times = result["times_peer_in_cpu_time"]
        yield f"{times:.1f} times in processor time, which other programs change less"
    if peer["below_tokens_per_second"]:
        times = result["ours"]["tokens_per_second"] / peer["below_tokens_per_second"]
        yield f"more than {times:.0f} times as fast as {peer['of']}, which had not done one micro-batch"
    if peer["ended"]:
        done = "no step was done" if not peer["steps"] else f"{peer['steps']} of its steps count"
        partly = (
            " (its rate is that of a part of one)" if not peer["steps"] and peer["tokens_per_second"] else ""
        )
        yield f"{peer['of']}: {peer['ended']}; {done}{partly}"
    for name in peer["without_lora_on"]:
        yield f"{peer['of']}: no LoRA on `{name}`, which PEFT refuses on Mamba models"


def _plan(result: dict[str, Any]) -> Iterator[str]:
    planned = result["plan"]
    if planned is not None:
        share = f", {planned['of_measured']:.2f} of what was measured" if planned["of_measured"] else ""
        if planned["of_measured_in_cpu_time"]:
            share += f" ({planned['of_measured_in_cpu_time']:.2f} in processor time)"
        source = planned["source"] if planned["source"] == "estimated" else f"measured in {planned['source']}"
        yield f"`plan` says {planned['tokens_per_second']:,.0f} tokens/s, {source}{share}"
