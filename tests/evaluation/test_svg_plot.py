"""Curves as SVG: right places, and no value that makes it fail."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from mamba_sft.evaluation.svg_plot import Curve, number_text, smooth, svg_text

SVG = "{http://www.w3.org/2000/svg}"


def marks(svg: str) -> list[str]:
    return [text.text or "" for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_a_value_is_drawn_where_it_is() -> None:
    svg = svg_text([Curve("a", [(0, 0.0), (5, 10.0), (10, 5.0)])], title="t", width=162, height=136)
    [path] = [p for p in ET.fromstring(svg).iter(f"{SVG}path") if p.get("class") == "c0"]
    points = [tuple(map(float, pair.split())) for pair in path.get("d", "").lstrip("M").split("L")]
    assert [x for x, _ in points] == [48, 98, 148]  # from the left margin to the right one
    low, high, middle = (y for _, y in points)
    assert (low, middle) == pytest.approx((110, 110 - (110 - high) / 2), abs=0.1)
    assert high == pytest.approx(10 + 100 * 0.5 / 10.5, abs=0.1)


def test_far_apart_values_get_a_logarithmic_axis_and_near_ones_none() -> None:
    far = marks(svg_text([Curve("a", [(1, 0.001), (2, 10.0)])], title="t"))
    assert {"0.01", "0.1", "1"} <= set(far)
    near = marks(svg_text([Curve("a", [(1, 2.0), (2, 10.0)])], title="t"))
    assert {"0", "5", "10"} <= set(near)


@pytest.mark.parametrize(
    "values",
    [[], [2.0], [0.0, 0.0], [5.0, 5.0], [math.nan], [1.0, math.inf, 2.0], [1e308, -1e308], [5e-324, 5e-324],
     [5e-324, 1e308], [-3.0, -2.0], [1.0, 1.0000000000000002], [1e15, 1e15 + 0.125]],
)  # fmt: skip
@pytest.mark.parametrize("logarithmic", [None, True, False])
def test_no_value_is_too_odd(values: list[float], logarithmic: bool | None) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    svg = svg_text([Curve("a", points)], title="t", logarithmic=logarithmic)
    ET.fromstring(svg)
    assert not re.search(r"nan|inf", svg.replace("middle", ""))


def test_a_gap_is_a_gap() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, math.nan), (4.0, 1.0), (5.0, 2.0)]
    svg = svg_text([Curve("a", points)], title="t")
    [path] = [p for p in ET.fromstring(svg).iter(f"{SVG}path") if p.get("class") == "c0"]
    assert path.get("d", "").count("M") == 2


def test_a_long_curve_is_thinned_and_keeps_its_spikes() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    svg = svg_text([Curve("a", points)], title="t", height=200)
    assert len(svg) < 30_000
    [path] = [p for p in ET.fromstring(svg).iter(f"{SVG}path") if p.get("class") == "c0"]
    heights = [float(pair.split()[1]) for pair in path.get("d", "")[1:].split("L")]
    assert min(heights) < 20
    assert max(heights) > 150


def test_names_are_text() -> None:
    svg = svg_text([Curve('<b>"&', [(1, 1.0)])], title='<i>"', legend=True)
    assert marks(svg)[-1] == '<b>"&'
    assert ET.fromstring(svg).get("aria-label") == '<i>"'


def test_the_smoothed_curve_follows_and_forgets_what_is_no_number() -> None:
    points = [(float(step), 1.0 + step % 2) for step in range(200)]
    found = smooth([*points, (200.0, math.nan)])
    assert len(found) == 200
    assert all(1.4 < value < 1.6 for _, value in found[100:])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (2e-4, "2e-4"), (4.718e-5, "4.72e-5"), (1234.0, "1,234"), (12_345.0, "12.3k"),
     (1.5e6, "1.5M"), (2e9, "2G"), (math.nan, "nan"), (-0.25, "-0.25")],
)  # fmt: skip
def test_numbers_on_an_axis(value: float, text: str) -> None:
    assert number_text(value) == text


def test_runs_of_different_lengths_are_smoothed_alike() -> None:
    points = [(float(step), 100.0 / (1 + step)) for step in range(200)]
    whole, begun = smooth(points, 200), smooth(points[:30], 200)
    assert begun == whole[:30]
    assert begun != smooth(points[:30])
