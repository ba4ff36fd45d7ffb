from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from tessera.plot import COLOURS, Axis, Series, line_chart, linear_ticks, log_ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.23, 3.04), (-7, 0.02), (5, 5), (0, 0)])
def test_linear_ticks_are_even_and_hold_the_range(low: float, high: float):
    ticks = linear_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 9
    steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))


@pytest.mark.parametrize(("low", "high"), [(1e-5, 30), (0.02, 0.9), (2.0, 2.4), (0.9, 1.1)])
def test_log_ticks_lie_in_the_range(low: float, high: float):
    ticks = log_ticks(low, high)
    assert len(ticks) >= 2 and all(low <= tick <= high for tick in ticks)


def test_an_axis_maps_its_ends_to_its_ends():
    axis = Axis(1, 100, (0, 10), (1, 10, 100), log=True)
    assert [axis(v) for v in (1, 10, 100)] == pytest.approx([0, 5, 10])


def test_a_chart_has_a_line_a_legend_and_a_tip_for_every_series():
    series = [Series(f"m<{i}>", [(1 + i, 0.1 + i, "one"), (2 + i, 0.2, "a & b")]) for i in range(6)]
    for log in (False, True):
        root = ElementTree.fromstring(line_chart(series, title="T & t", x="x", y="y", log=log))
        lines = root.findall(f".//{SVG}polyline")
        assert [line.get("stroke") for line in lines] == list(COLOURS)
        texts = [text.text for text in root.iter(f"{SVG}text")]
        assert {"T & t", "x", "y", *(one.name for one in series)} <= set(texts)
        tips = [tip.text for tip in root.iter(f"{SVG}title")]
        assert tips == ["one", "a & b"] * 6
        width = float(root.get("width") or 0)
        points = [float(p.split(",")[0]) for line in lines for p in line.get("points", "").split()]
        assert all(0 < x < width for x in points)
