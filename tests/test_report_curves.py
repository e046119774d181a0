"""models/report_curves.py: the charts of a report."""

import math
import re

import pytest

from models.report_curves import MOST_POINTS, Line, line_chart


def test_a_chart_draws_what_it_is_given():
    drawn = line_chart("loss <1>", [Line("a & b", [0, 1, 2, 3, 4], [4.0, 2.0, math.nan, 1.0, 0.0])], "epoch")
    assert "loss &lt;1&gt;" in drawn
    first, second = (re.findall(r"[\d.]+", points) for points in re.findall(r' points="(.*?)"', drawn))
    assert len(first) == 4 and len(second) == 4  # a gap where nothing was measured
    # y from 0 to 4 is from 192 to 10, x from 0 to 4 is from 50 to 388
    assert first == ["50.0", "10.0", "134.5", "101.0"] and second == ["303.5", "146.5", "388.0", "192.0"]
    assert [float(text) for text in re.findall(r'text-anchor="end">([\d.]+)<', drawn)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("values", [[], [math.nan], [1.0], [0.0, 0.0], [1e-12, 1e-12], [-1e250, 1e250], [5e-324]])
def test_charts_of_odd_values(values):
    drawn = line_chart("x", [Line("a", list(range(len(values))), values)], "step")
    assert "nan" not in drawn and "inf" not in drawn
    assert ("nothing was recorded" in drawn) == (not any(map(math.isfinite, values)))


def test_long_lines_are_averaged():
    drawn = line_chart("x", [Line("a", range(100_000), [float(i % 2) for i in range(100_000)])], "step")
    (points,) = re.findall(r' points="(.*?)"', drawn)
    heights = {point.split(",")[1] for point in points.split()}
    assert len(points.split()) <= MOST_POINTS and len(drawn) < 10_000 and len(heights) == 1
