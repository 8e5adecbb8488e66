"""The plots of `plan`: learning rate, batch and row length over the tokens read, in a terminal or as SVG."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from mamba_sft.evaluation.svg_plot import Curve, number_text, svg_text

if TYPE_CHECKING:
    from mamba_sft.planning.curves import Curves

WIDTH, HEIGHT = 80, 7
"""Columns of a plot with its axis, and rows of each of its panels."""
_MARKS = 10  # columns of the marks on the left
_PANEL_WIDTH, _PANEL_HEIGHT = 880, 200  # of the SVG
_ROUNDING = 1e-9


def terminal_plot(curves: Curves) -> Iterator[str]:
    """Returns the lines of the plot, in characters that every terminal has."""
    yield _heading(curves)
    for name, values in _panels(curves):
        yield ""
        yield from _panel(name, values, curves.read)
    total = number_text(float(curves.read[-1]))
    yield " " * _MARKS + f"0{'tokens':^{WIDTH - _MARKS - 1 - len(total)}}{total}"


def svg_plots(curves: Curves) -> str:
    """Returns the panels of the plot as one `<svg>`, under each other."""
    panels = []
    for number, (name, values) in enumerate(_panels(curves)):
        # a step keeps its value for all tokens that it reads
        points = [
            (float(at), float(value))
            for start, end, value in zip(curves.read[:-1], curves.read[1:], values, strict=True)
            for at in (start, end)
        ]
        curve = Curve(f"{name} over tokens", points, color=number)
        drawn = svg_text(
            [curve], title=curve.name, width=_PANEL_WIDTH, height=_PANEL_HEIGHT,
            logarithmic=False, from_zero=True, legend=True,
        )  # fmt: skip
        place = f'y="{number * _PANEL_HEIGHT}" width="{_PANEL_WIDTH}" height="{_PANEL_HEIGHT}"'
        panels.append(drawn.replace("<svg ", f"<svg {place} ", 1))
    height = len(panels) * _PANEL_HEIGHT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_PANEL_WIDTH} {height}">'
    return "".join([head, f"<title>{_heading(curves)}</title>", *panels, "</svg>\n"])


def _heading(curves: Curves) -> str:
    steps, tokens = len(curves.tokens), int(curves.read[-1])
    how = ", estimated with rows of `data.max_length`" if curves.estimated else ""
    return f"{steps:,} steps over {number_text(float(tokens))} tokens{how}"


def _panels(curves: Curves) -> list[tuple[str, np.ndarray]]:
    return [
        ("learning rate", curves.rates),
        ("global batch, rows", curves.sizes.astype(np.float64)),
        ("row length, tokens in the mean", curves.lengths),
    ]


def _panel(name: str, values: np.ndarray, read: np.ndarray) -> Iterator[str]:
    """One curve: its name, its rows from the top, and an axis.

    In each column stands what the steps have whose tokens lie there, from the least to the most; from 0 up.
    """
    low, high = _column_ends(values, read, WIDTH - _MARKS - 1)
    top = float(values.max())
    levels = [np.clip((ends / top * HEIGHT - _ROUNDING).astype(int), 0, HEIGHT - 1) for ends in (low, high)]
    yield f"{'':{_MARKS}} {name}: first {number_text(float(values[0]))}, " + (
        f"most {number_text(top)}, last {number_text(float(values[-1]))}"
    )
    for row in reversed(range(HEIGHT)):
        mark = number_text(top) if row == HEIGHT - 1 else ""
        drawn = "".join(
            "*" if least <= row <= most else " " for least, most in zip(*levels, strict=True)
        ).rstrip()
        yield f"{mark:>{_MARKS - 1}} |{drawn}"
    yield f"{'0':>{_MARKS - 1}} +" + "-" * (WIDTH - _MARKS - 1)


def _column_ends(values: np.ndarray, read: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the most of the steps that read tokens of each column; a jump is drawn as a line."""
    edges = np.linspace(0, read[-1], columns + 1)
    first = np.clip(np.searchsorted(read, edges[:-1], side="right") - 1, 0, len(values) - 1)
    last = np.clip(np.searchsorted(read, edges[1:], side="left") - 1, first, len(values) - 1)
    low = np.array([values[start : end + 1].min() for start, end in zip(first, last, strict=True)])
    high = np.array([values[start : end + 1].max() for start, end in zip(first, last, strict=True)])
    return low, high
