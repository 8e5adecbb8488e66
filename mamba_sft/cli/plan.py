"""The verb `plan`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mamba_sft.cli import completing
from mamba_sft.cli.console import Json, Overrides, RecipeArgument, err, out
from mamba_sft.wording import GIB, size_text, time_text

if TYPE_CHECKING:
    from mamba_sft.planning.curves import Curves
    from mamba_sft.planning.plan import Plan
    from mamba_sft.planning.speed import Rate
    from mamba_sft.recipe.recipe import Recipe

INDENT, LABEL, FIGURE = 11, 28, 8
WIDEST_BAR = 40
NAMES = {
    "weights": "base weights",
    "adapter": "adapter, float32",
    "gradients": "its gradients",
    "optimizer": "its optimizer state",
    "states": "states of the recurrence",
    "kept": "kept for the backward",
    "block": "one block in backward",
    "dequantized": "a weight, unpacked",
    "loss": "loss, in chunks",
    "rows": "gradient of the embeddings",
    "overhead": "CUDA and allocator",
}
FULL_NAMES = {"weights": "weights, float32", "gradients": "gradients", "optimizer": "optimizer state"}
"""What is otherwise named where all weights are trained."""


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--card",
            metavar="NAME",
            help="A GPU, such as t4, 4090, a100-80, h100; default: this machine.",
            autocompletion=completing.cards,
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Plan for so many GPUs, on each of `--nodes` machines.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(metavar="N", help="Machines; default: one.")] = None,
    link: Annotated[
        float | None, typer.Option(metavar="GBITS", help="Gb/s between machines; default: 100.")
    ] = None,
    as_json: Json = False,
    plot: Annotated[
        bool,
        typer.Option(
            "--plot",
            help="Draw learning rate, batch and row length over tokens; with --json, one value a step.",
        ),
    ] = False,
    plot_file: Annotated[
        Path | None, typer.Option("--plot-file", metavar="PLOT.svg", help="Draw them into an SVG file.")
    ] = None,
) -> None:
    """Say what a recipe takes and whether it fits; loads nothing.

    Example: mamba-sft plan instruct-qlora --card 4090
    """
    from mamba_sft.cli import plan_plot
    from mamba_sft.planning.gpu_names import known_gpu
    from mamba_sft.recipe.recipe import Recipe

    loaded = Recipe.load(recipe, overrides=overrides or [])
    if gpu is not None:
        known_gpu(gpu)  # before torch is loaded
    from mamba_sft.cli.plan_many import many_lines, plan_asked

    if plot_file is not None:
        plan_plot.check_plot_file(plot_file)
    from mamba_sft.planning.plan import make_plan

    with err.status("planning"):
        made = make_plan(loaded, gpu)
        curves = _curves(loaded, made) if plot or plot_file is not None else None
        many = plan_asked(loaded, made, processes, nodes, link)
    if curves is not None and plot_file is not None:
        plan_plot.write_plot(curves, plot_file)
    if as_json:
        more = {"many": many.to_dict()} if many else {}
        more |= {"curves": curves.to_dict()} if curves is not None and plot else {}
        sys.stdout.write(json.dumps(made.to_dict() | more, indent=None if "curves" in more else 2) + "\n")
        return
    for line in (*_model(made), *_memory(made), *_room(made), *_time(made), *_disk(made)):
        out.print(line)
    for head, text in many_lines(many) if many else ():
        out.print(_line(head, text))
    for line in (*_fixes(made, recipe, overrides or []), *_warnings(made)):
        out.print(line)
    if curves is not None and plot:
        out.print()
        out.print("\n".join(plan_plot.terminal_plot(curves)))
    if plot_file is not None:
        out.print(_line("plot", f"written to {plot_file}"))


def _curves(recipe: Recipe, made: Plan) -> Curves:
    from mamba_sft.planning.curves import run_curves

    return run_curves(recipe, made.course)


def _line(head: str, text: str, style: str = "") -> Text:
    line = Text(f"{head:<{INDENT}}", style="bold")
    return line.append(text, style=style or "not bold")


def _model(made: Plan) -> Iterator[Text]:
    from mamba_sft.model.quantization import misfits

    shape, work = made.work.shape, made.work
    share = work.trained / shape.parameters
    yield _line("model", f"{made.base[0]} (sizes from {made.base[1]})")
    yield _line("", f"{_count(shape.parameters)} parameters, {_count(work.trained)} trained ({share:.2%})")
    micro = f"{work.rows} x {work.length:,} tokens at once"
    if work.streams:
        micro = f"{work.rows} x {work.length:,} tokens, {work.chunk:,} at a time"
    bits = "32-bit" if work.itemsize == 4 else "16-bit"
    if work.is_full and work.mixed:
        bits = "32-bit weights, products in 16-bit"
    numbers = bits if work.quantization == "none" else f"{work.quantization} and {bits}"
    yield _line("step", f"{micro}, checkpointing {work.policy}, {numbers}")
    for name, reason in misfits(shape, work.quantization).items():
        yield _line("", f"`{name}` stays {bits}: {reason}")


def _memory(made: Plan) -> Iterator[Text]:
    parts, usable = made.parts, made.accelerator.usable_bytes
    ends = {
        "block": parts["block"] + parts["dequantized"] >= parts["loss"],
        "loss": parts["block"] + parts["dequantized"] < parts["loss"],
    }
    yield _line("memory", "planned, not measured; GiB (in brackets: not at the time of the peak)")
    names = NAMES | (FULL_NAMES if made.work.is_full else {})
    for name, size in parts.items():
        if round(size / GIB, 2) == 0:
            continue
        counted = ends.get("block" if name == "dequantized" else name, name != "rows")
        label = names[name] if name != "overhead" or made.accelerator.type == "cuda" else "libraries"
        yield _bar(label, size, usable, counted)
    yield _bar("at once, at most", made.peak, usable, counted=True, total=True)


def _bar(label: str, size: int, usable: int, counted: bool, total: bool = False) -> Text:
    """A part of the memory: its name, GiB, and a bar in proportion to the device; dim if at another time."""
    width = max(0, min(WIDEST_BAR, out.width - INDENT - LABEL - FIGURE - 3))
    figure = f"{size / GIB:.2f} " if counted else f"({size / GIB:.2f})"
    style = "bold" if total else ("not bold" if counted else "dim")
    line = Text(" " * INDENT).append(f"{label:<{LABEL}}{figure:>{FIGURE}} ", style=style)
    if usable:
        full = out.encoding.lower().startswith("utf")
        cells = min(width, round(width * size / usable))
        over = total and size > usable
        line.append(("█" if full else "#") * cells, style="red" if over else ("green" if total else style))
    return line


def _room(made: Plan) -> Iterator[Text]:
    device, work = made.accelerator, made.work
    usable = f"{size_text(device.usable_bytes)} usable"
    left = device.usable_bytes - made.peak
    verdict = f"fits, {size_text(left)} left" if made.fits else f"does not fit: {size_text(-left)} too much"
    line = _line("device", f"{device.name_with_memory}, {usable}: ")
    yield line.append(verdict, style="bold green" if made.fits else "bold red")
    if made.wants_bfloat16 and not device.bfloat16:
        yield _line("", "it has no bfloat16, so the run would take float16", "yellow")
    rows = f"a batch of {made.largest_rows:,}" if made.largest_rows else "no batch"
    yield _line("largest", f"{rows} at {work.length:,} tokens")
    yield _line("", f"{_longest(made)} at a batch of {work.rows:,}")
    if work.boundaries and device.type == "cuda":
        yield _line("", f"states of the chunks wait in host memory: {size_text(work.boundaries)}")


def _longest(made: Plan) -> str:
    if made.largest_length >= 1 << 20:
        return "rows of any length"
    return f"rows of {made.largest_length:,} tokens" if made.largest_length else "no row"


def _time(made: Plan) -> Iterator[Text]:
    steps = "steps: known when the data is here" if made.steps is None else f"{made.steps:,} steps"
    growing = "up to " if made.accumulation is None else ""  # by `train.batch_ramp`
    yield _line("tokens", f"{growing}{made.tokens_per_step:,} a step on one device; {steps}")
    if made.length is not None and made.length.chosen:
        yield _line("", f"gradient_accumulation_steps left out, so {made.accumulation}")
    if made.most_tokens is not None:
        known = "about" if made.steps is not None else "at most"
        yield _line("", f"{known} {_count(made.most_tokens)} in all")
    if made.rate is None:
        yield _line("time", "unknown: there is no run here to go by, and the device is not in the table")
        return
    yield _line("time", f"{made.rate.tokens_per_second:,.0f} tokens/s, {_known_from(made.rate)}")
    if made.rate.processor is not None:
        yield _line("", f"this processor: {made.rate.processor}")
    if made.seconds is not None:
        bound = "" if made.steps is not None else "at most "
        yield _line("", f"{bound}{time_text(made.seconds)} of training")
    else:
        yield _line("", f"{time_text(1e6 / made.rate.tokens_per_second)} for a million tokens")


def _known_from(rate: Rate) -> str:
    if rate.source != "estimated":
        return f"measured in {rate.source}"
    return "estimated by counting operations" if rate.processor is None else "estimated from parts of a step"


def _disk(made: Plan) -> Iterator[Text]:
    disk, result = made.disk, "model" if made.work.is_full else "adapter"
    yield _line(
        "disk",
        f"download {size_text(disk['download'])}, {result} {size_text(disk[result])}, "
        f"checkpoints {size_text(disk['checkpoints'])}",
    )
    merged = "" if made.work.is_full else f"merged {size_text(disk['merged'])}, "
    yield _line(
        "", f"{merged}GGUF F16 {size_text(disk['gguf_f16'])}, Q4_K_M {size_text(disk['gguf_q4_k_m'])}"
    )


def _fixes(made: Plan, recipe: str, overrides: list[str]) -> Iterator[Text]:
    """What would fit, each way as a command to paste."""
    if made.fits:
        return
    if not made.fixes:
        yield _line("change", "nothing makes it fit: it needs a device with more memory", "bold red")
    for number, fix in enumerate(made.fixes):
        cost = f"{size_text(fix.peak)}, {fix.slowdown:.2f} times the time"
        yield _line("change" if number == 0 else "", cost)
        changed = {override.partition("=")[0] for override in fix.overrides}
        kept = [override for override in overrides if override.partition("=")[0].strip() not in changed]
        for line in pasteable(["mamba-sft", "train", recipe, *kept, *fix.overrides], out.width):
            yield Text(line, "cyan")


def pasteable(words: list[str], width: int) -> list[str]:
    """Returns a command on as many lines as it takes, which a shell reads as one when they are pasted."""
    lines = ["  "]
    for word in map(shlex.quote, words):
        if lines[-1].strip() and len(lines[-1]) + 1 + len(word) + len(" \\") > width:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += word if not lines[-1].strip() and len(lines) == 1 else f" {word}"
    return lines


def _warnings(made: Plan) -> Iterator[Text]:
    """What makes so short a run learn little; the fields to change on lines of their own."""
    for warning in made.length.warnings() if made.length else []:
        text, _, fields = warning.partition("\n")
        lines = wrap(text, max(40, out.width - INDENT), break_long_words=False, break_on_hyphens=False)
        for number, line in enumerate(lines):
            yield _line("look" if number == 0 else "", line, "yellow")
        yield _line("", f"  {fields}", "cyan")


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
