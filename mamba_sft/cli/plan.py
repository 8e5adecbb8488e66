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
from mamba_sft.cli.console import Json, Overrides, RecipeArgument, err, loading, out
from mamba_sft.cli.output_files import check_output_file, write_output
from mamba_sft.wording import GIB, size_text

if TYPE_CHECKING:
    from mamba_sft.planning.curves import Curves
    from mamba_sft.planning.plan import Plan
    from mamba_sft.recipe.recipe import Recipe

INDENT, LABEL, FIGURE = 11, 28, 8
WIDEST_BAR = 40


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
    check_output_file(plot_file, ".svg", "--plot-file")
    with loading("torch and transformers"):
        from mamba_sft.cli.plan_many import many_lines, plan_asked
        from mamba_sft.planning.plan import make_plan

    with err.status("planning"):
        made = make_plan(loaded, gpu)
        curves = _curves(loaded, made) if plot or plot_file is not None else None
        many = plan_asked(loaded, made, processes, nodes, link)
    if curves is not None and plot_file is not None:
        write_output(plan_plot.svg_plots(curves), plot_file, "--plot-file")
    if as_json:
        more = {"many": many.to_dict()} if many else {}
        more |= {"curves": curves.to_dict()} if curves is not None and plot else {}
        sys.stdout.write(json.dumps(made.to_dict() | more, indent=None if "curves" in more else 2) + "\n")
        return
    shared = [_line(head, text) for head, text in many_lines(many)] if many else []
    for line in (*_all_of(made), *shared, *_fixes(made, recipe, overrides or []), *_warnings(made)):
        out.print(line)
    if curves is not None and plot:
        out.print()
        out.print("\n".join(plan_plot.terminal_plot(curves)))
    if plot_file is not None:
        out.print(_line("plot", f"written to {plot_file}"))


def _all_of(made: Plan) -> Iterator[Text]:
    from mamba_sft.planning import in_words

    yield from (*_lines(in_words.model(made)), *_memory(made), *_room(made))
    yield from (*_lines(in_words.time(made)), *_lines(in_words.disk(made)))


def _curves(recipe: Recipe, made: Plan) -> Curves:
    from mamba_sft.planning.curves import run_curves

    return run_curves(recipe, made.course)


def _line(head: str, text: str, style: str = "") -> Text:
    line = Text(f"{head:<{INDENT}}", style="bold")
    return line.append(text, style=style or "not bold")


def _lines(told: Iterator[tuple[str, str]]) -> Iterator[Text]:
    return (_line(head, text) for head, text in told)


def _memory(made: Plan) -> Iterator[Text]:
    from mamba_sft.planning.in_words import memory_parts

    usable = made.accelerator.usable_bytes
    yield _line("memory", "planned, not measured; GiB (in brackets: not at the time of the peak)")
    for label, size, counted in memory_parts(made):
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
    from mamba_sft.planning import in_words

    device, verdict = in_words.device(made)
    line = _line("device", device)
    yield line.append(verdict, style="bold green" if made.fits else "bold red")
    if in_words.falls_back(made):
        yield _line("", in_words.FALLS_BACK, "yellow")
    yield from _lines(in_words.largest(made))


def _fixes(made: Plan, recipe: str, overrides: list[str]) -> Iterator[Text]:
    """What would fit, each way as a command to paste."""
    from mamba_sft.recipe.yaml_text import overridden

    if made.fits:
        return
    if not made.fixes:
        yield _line("change", "nothing makes it fit: it needs a device with more memory", "bold red")
    for number, fix in enumerate(made.fixes):
        cost = f"{size_text(fix.peak)}, {fix.slowdown:.2f} times the time"
        yield _line("change" if number == 0 else "", cost)
        changed = overridden(fix.overrides)
        kept = [override for override in overrides if overridden([override]).isdisjoint(changed)]
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
