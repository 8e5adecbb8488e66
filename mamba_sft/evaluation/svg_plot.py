"""Curves over the steps of a run as SVG: small, sharp on every screen, and no library behind it.

Every mark has a class, which a page colours for light and dark, and beside it plain attributes, so that the
same text is a picture of its own: black on white.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

Point = tuple[float, float]

COLORS = ("#1971c2", "#e8590c", "#2f9e44", "#9c36b5", "#c2255c", "#0b7285", "#e67700", "#495057")
"""Of the curves, on white; `.c0` to `.c7` of a page's style are the same ones for light and dark."""
LOGARITHMIC = 20
"""Times the smallest value, from which on the largest is drawn on a logarithmic axis."""
_MOST_POINTS = 600
_ZERO = 0.4  # of the largest value: a smallest value below it draws the axis down to zero
_HUGE = 1e100
_TOP, _RIGHT, _BOTTOM, _LEFT = 10, 14, 26, 48
_LEGEND = 22


@dataclass(frozen=True)
class Curve:
    """One curve of a plot.

    Args:
        name: What the legend calls it.
        points: (step, value), in order; where a value is no finite number the curve has a gap.
        color: Its number in `COLORS`, counted round.
        kind: `line`; `faint` for what is noisy and stands behind another; `dots` for few values.
    """

    name: str
    points: Sequence[Point]
    color: int = 0
    kind: Literal["line", "faint", "dots"] = "line"

    @property
    def style(self) -> str:
        """The class that colours it."""
        return f"c{self.color % len(COLORS)}"


def in_both_widths(curves: Sequence[Curve], *, title: str) -> list[tuple[str, str]]:
    """Returns the plot at the head of a page as (class, `<svg>`): for a wide page and for a phone."""
    return [
        ("wide", svg_text(curves, title=title, width=1000, height=300)),
        ("narrow", svg_text(curves, title=title, height=260)),
    ]


def svg_text(
    curves: Sequence[Curve],
    *,
    title: str,
    width: int = 440,
    height: int = 200,
    logarithmic: bool | None = None,
    from_zero: bool = False,
    legend: bool = False,
) -> str:
    """Returns curves over steps as an `<svg>` element.

    Args:
        curves: What is drawn, the first ones behind.
        title: For readers who cannot see it.
        width: Of its own coordinates; it scales to any.
        height: The same.
        logarithmic: Whether the vertical axis is; None: where values lie far apart.
        from_zero: Whether an axis that is not begins at zero.
        legend: Whether it names its curves itself.
    """
    curves = [replace(curve, points=[(x, _drawable(y)) for x, y in curve.points]) for curve in curves]
    values = [y for curve in curves for _, y in curve.points if math.isfinite(y)]
    steps = [x for curve in curves for x, _ in curve.points]
    if logarithmic is None:
        logarithmic = is_logarithmic(values)
    vertical = _logarithmic_axis(values) if logarithmic else _linear_axis([0.0] * from_zero + values)
    top = _TOP + _LEGEND * legend
    across = _Scale(*_steps(steps), _LEFT, width - _RIGHT)
    up = _Scale(vertical.low, vertical.high, height - _BOTTOM, top)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="11">',
        f'<rect class="back" width="{width}" height="{height}" fill="#fff"/>',
        *_grid(vertical, up, width),
        *_step_marks(across, width, height),
        *(_legend(curves) if legend else ()),
        *(_drawn(curve, across, lambda y: up(vertical.place(y))) for curve in curves),
        "</svg>",
    ]
    return "".join(parts)


def is_logarithmic(values: Iterable[float]) -> bool:
    """Returns whether values lie so far apart that a logarithmic axis shows more of them."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) >= LOGARITHMIC * min(finite)


def smooth(points: Sequence[Point], longest: int = 0) -> list[Point]:
    """Returns the exponential moving average over about a twentieth of the run.

    Args:
        points: What was logged.
        longest: Points of the longest run beside it, if it has more: runs that are compared are all smoothed
            alike, or the same values would not lie on each other.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    weight = max(0.0, 1 - 20 / max(1, len(finite), longest))
    found: list[Point] = []
    total = norm = 0.0
    for step, value in finite:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        found.append((step, total / norm))
    return found


def number_text(value: float) -> str:
    """Returns a number for an axis or a caption: three figures, thousands as `12k`, small ones as `2e-4`."""
    size = abs(value)
    if size == 0 or not math.isfinite(value):
        return f"{value:g}"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= 0.9995 * unit:
            return f"{value / (1e3 if letter == 'k' else unit):.3g}{letter}"
    if size >= 1e3:
        return f"{value:,.0f}"
    if size >= 1e-3:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _drawable(value: float) -> float:
    """A value that arithmetic on coordinates can hold; what is larger is a gap, as NaN is."""
    if not abs(value) < _HUGE:
        return math.nan
    return value if abs(value) > 1 / _HUGE else 0.0


@dataclass(frozen=True)
class _Scale:
    """From values to coordinates."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class _Axis:
    """A vertical axis: its ends, and its marks as (place, text)."""

    low: float
    high: float
    marks: list[tuple[float, str]]
    place: Callable[[float], float]


def _linear_axis(values: Sequence[float]) -> _Axis:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if 0 <= low <= _ZERO * high:
        low = 0.0
    gap = max(high - low, 1e-9 * abs(high)) if high > low else abs(high) or 1.0
    low, high = low if low == 0 else low - 0.05 * gap, high + 0.05 * gap
    marks = [(mark, number_text(mark)) for mark in _nice_marks(low, high, 4)]
    return _Axis(low, high, marks, lambda value: value)


def _logarithmic_axis(values: Sequence[float]) -> _Axis:
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.log10(min(positive)), math.log10(max(positive))
    gap = (high - low) or 1.0
    low, high = low - 0.05 * gap, high + 0.05 * gap
    every = max(1, round((high - low) / 4))
    decades = range(math.floor(low), math.ceil(high) + 1)
    heads = (1, 2, 5) if high - low < 2.5 else (1,)
    marks = [
        (place, number_text(10.0**power * head))
        for power in decades
        if power % every == 0
        for head in heads
        if low <= (place := power + math.log10(head)) <= high
    ]
    return _Axis(low, high, marks, lambda value: math.log10(value) if value > 0 else low)


def _nice_marks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two, about that many."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    size = next(unit * head for head in (1, 2, 5, 10) if unit * head >= rough * 0.999)
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [number * size for number in range(first, last + 1)]


def _steps(steps: Sequence[float]) -> tuple[float, float]:
    if not steps:
        return 0, 1
    return (min(steps), max(steps)) if min(steps) < max(steps) else (steps[0] - 1, steps[0] + 1)


def _grid(axis: _Axis, up: _Scale, width: int) -> Iterable[str]:
    for place, text in axis.marks:
        y = f"{up(place):.1f}"
        yield (
            f'<path class="grid" d="M{_LEFT} {y}H{width - _RIGHT}" stroke="#8884" fill="none"/>'
            f'<text class="mark" x="{_LEFT - 6}" y="{y}" dy="4" text-anchor="end" fill="#666">{text}</text>'
        )


def _step_marks(across: _Scale, width: int, height: int) -> Iterable[str]:
    base = height - _BOTTOM
    yield f'<path class="axis" d="M{_LEFT} {base}H{width - _RIGHT}" stroke="#888" fill="none"/>'
    for step in _nice_marks(across.low, across.high, max(3, width // 110)):
        if step == int(step):
            x = f"{across(step):.1f}"
            yield (
                f'<text class="mark" x="{x}" y="{base + 17}" text-anchor="middle" fill="#666">'
                f"{number_text(step)}</text>"
            )


def _legend(curves: Sequence[Curve]) -> Iterable[str]:
    x = float(_LEFT)
    for curve in curves:
        color = COLORS[curve.color % len(COLORS)]
        faint = ' stroke-opacity=".35"' if curve.kind == "faint" else ""
        yield f'<path d="M{x:.0f} 14h16" stroke="{color}" stroke-width="3"{faint} fill="none"/>'
        yield f'<text x="{x + 21:.0f}" y="18" fill="#333">{escape(curve.name)}</text>'
        x += 40 + 6.2 * len(curve.name)


def _drawn(curve: Curve, across: _Scale, up: Callable[[float], float]) -> str:
    color = COLORS[curve.color % len(COLORS)]
    placed = [
        [(across(x), up(y)) for x, y in piece]
        for piece in _pieces(_thinned(curve.points, _MOST_POINTS))
        if piece
    ]
    texts = [[f"{x:.1f} {y:.1f}" for x, y in piece] for piece in placed if len(piece) > 1]
    lines = "".join("M" + "L".join(piece) for piece in texts)
    dotted = [point for piece in placed for point in piece if curve.kind == "dots" or len(piece) == 1]
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in dotted)
    wide, seen = ("1.2", ".4") if curve.kind == "faint" else ("2", "1")
    drawn = ""
    if lines:
        drawn += (
            f'<path class="{curve.style}" d="{lines}" stroke="{color}" stroke-width="{wide}"'
            f' stroke-opacity="{seen}" stroke-linejoin="round" fill="none"/>'
        )
    if dots:
        drawn += f'<g class="{curve.style} dot" fill="{color}" fill-opacity="{seen}">{dots}</g>'
    return drawn


def _pieces(points: Iterable[Point]) -> list[list[Point]]:
    """The runs of points between values that are no finite numbers."""
    pieces: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            pieces[-1].append((x, y))
        else:
            pieces.append([])
    return pieces


def _thinned(points: Sequence[Point], most: int) -> list[Point]:
    """About `most` points that look the same: the lowest and the highest of each of many short stretches."""
    if len(points) <= most:
        return list(points)
    size = 2 * len(points) / most
    found: list[Point] = [points[0]]
    for number in range(most // 2):
        stretch = points[round(number * size) : round((number + 1) * size)]
        broken = [point for point in stretch if not math.isfinite(point[1])]
        ends = [min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])]
        found += sorted(broken[:1] or ends)
    return [*found, points[-1]]
