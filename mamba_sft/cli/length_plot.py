"""The plots of `bench generate`: speed and memory over the length of the prompt, in a terminal or as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import cycle
from typing import Any

from mamba_sft.evaluation.svg_plot import Curve, number_text, svg_text
from mamba_sft.wording import GIB

WIDTH, HEIGHT = 60, 7
"""Columns and rows of a panel, without its axes."""
MARKS = "ox+*#@%&" + "abcdefghijklmnpqrstuvwyz"
"""One for each curve; of more curves than these, marks come again."""
PANELS = {
    "prefill_tokens_per_second": "prefill, tokens/s",
    "decode_tokens_per_second": "decoding, tokens/s",
    "peak_bytes": "peak memory, GiB",
}
_LEFT = 9
_PANEL_WIDTH, _PANEL_HEIGHT = 880, 220  # of the SVG

Series = dict[str, list[tuple[float, float]]]


def series(result: dict[str, Any], name: str) -> Series:
    """Returns (length, value) of every side and batch size, by what it is called."""
    several = len(result["settings"]["batch_sizes"]) > 1
    found: Series = {}
    for row in result["rows"]:
        called = f"{row['of']}, batch {row['batch_size']}" if several else row["of"]
        value = row[name] / GIB if name == "peak_bytes" else row[name]
        found.setdefault(called, []).append((float(row["length"]), float(value)))
    return found


def terminal_plots(result: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of all panels: lengths on a logarithmic axis, values from 0 up.

    Values of which the highest is more than 20 times the lowest have a logarithmic axis too.
    """
    if len(result["settings"]["lengths"]) < 2:
        return
    for name, title in PANELS.items():
        yield ""
        yield from _panel(title, series(result, name))


def _panel(title: str, curves: Series) -> Iterator[str]:
    names = [f"{mark} {name}" for mark, name in zip(cycle(MARKS), curves, strict=False)]
    points = [point for curve in curves.values() for point in curve]
    low, high = (end(y for _, y in points) for end in (min, max))
    logarithmic = 0 < 20 * low < high
    lengths = [math.log2(x) for x, _ in points]
    first, span = min(lengths), max(lengths) - min(lengths) or 1.0
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for mark, curve in zip(cycle(MARKS), curves.values(), strict=False):
        for x, y in curve:
            share = math.log(y / low) / math.log(high / low) if logarithmic else y / (high or 1.0)
            column = round((math.log2(x) - first) / span * (WIDTH - 1))
            grid[HEIGHT - 1 - round(share * (HEIGHT - 1))][column] = mark
    yield f"{'':{_LEFT}} {title}{' (logarithmic)' if logarithmic else ''}: {', '.join(names)}"
    for number, cells in enumerate(grid):
        label = number_text(high) if number == 0 else ""
        yield f"{label:>{_LEFT - 1}} |{''.join(cells)}".rstrip()
    yield f"{number_text(low) if logarithmic else '0':>{_LEFT - 1}} +{'-' * WIDTH}"
    ends = [number_text(2**x) for x in (first, max(lengths))]
    yield f"{'':{_LEFT}} {ends[0]}{'tokens of the prompt':^{WIDTH - len(ends[0]) - len(ends[1])}}{ends[1]}"


def svg_plots(result: dict[str, Any]) -> str:
    """Returns the panels as one `<svg>`, under each other."""
    panels = []
    for number, (name, title) in enumerate(PANELS.items()):
        curves = [
            Curve(f"{title}: {called}", points, color=color)
            for color, (called, points) in enumerate(series(result, name).items())
        ]
        drawn = svg_text(
            curves, title=f"{title} over tokens of the prompt", width=_PANEL_WIDTH, height=_PANEL_HEIGHT,
            from_zero=True, legend=True,
        )  # fmt: skip
        place = f'y="{number * _PANEL_HEIGHT}" width="{_PANEL_WIDTH}" height="{_PANEL_HEIGHT}"'
        panels.append(drawn.replace("<svg ", f"<svg {place} ", 1))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_PANEL_WIDTH} {len(panels) * _PANEL_HEIGHT}">'
    )
    return "".join([head, "<title>speed and memory over tokens of the prompt</title>", *panels, "</svg>\n"])
