"""Curves in a terminal and on a page."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from polyaccel.tracking.charts import braille, sparkline, svg

FALLING = [(step, 100.0 - step) for step in range(101)]


def test_a_sparkline_falls_with_its_values_and_keeps_its_width():
    line = sparkline(FALLING, 8)
    assert line == "█▇▆▅▄▃▂▁"
    assert sparkline([], 8) == ""
    assert sparkline([(0, 5.0)]) == "▁"
    assert sparkline([(0, 0.0), (1, math.nan), (2, 1.0)]) == "▁!█"


def test_a_terminal_plot_has_its_extremes_on_the_axes_and_its_dots_on_the_diagonal():
    lines = braille({"loss": FALLING}, width=10, height=5).splitlines()
    assert lines[0].split("│")[0].strip() == "100"
    assert lines[4].split("│")[0].strip() == "0"
    assert lines[6].split() == ["0", "100"]
    filled = [[cell != "\u2800" for cell in line.split("│")[1]] for line in lines[:5]]
    assert [row.index(True) for row in filled] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("series", [[], [(0, math.nan)], [(0, math.inf)]])
def test_nothing_finite_is_no_plot_and_no_crash(series):
    assert braille({"loss": series}) == "nothing to plot"
    assert "no finite values" in svg({"loss": series}, "loss")


@pytest.mark.parametrize(
    "series", [[(3, 1.0)], [(0, 2.0), (1, 2.0)], FALLING, [(0, 1e-30), (1, 1e30)], [(0, 1.0), (1, math.nan), (2, 3.0)]]
)
@pytest.mark.parametrize("log_scale", [False, True])
def test_an_svg_is_well_formed_and_every_coordinate_is_inside(series, log_scale):
    root = ElementTree.fromstring(svg({"<loss> & co": series}, "<loss> & co", log_scale=log_scale))
    for element in root.iter():
        if element.tag.endswith("polyline"):
            for x, y in (map(float, point.split(",")) for point in element.get("points").split()):
                assert 0 <= x <= 640
                assert 0 <= y <= 260


def test_a_million_points_become_a_thousand():
    assert len(svg({"loss": [(step, float(step)) for step in range(100_000)]}, "loss")) < 30_000
