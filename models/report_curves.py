"""Line charts as inline SVG, in the colours of the page: `line_chart` and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .page import Html, tag

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 38
MOST_POINTS = 300
"""Of a line; more are averaged, since the chart has no more pixels for them."""
NUM_COLOURS, DASHES = 7, ("", "6 3", "2 3")

STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.2rem 1.5rem }
.chart svg { width: 100%; height: auto; display: block } .chart b { display: block; font-weight: 600 }
.chart text { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: var(--soft) }
.chart .grid { stroke: var(--line); stroke-width: 1 } .chart polyline { fill: none; stroke-width: 1.6;
  stroke-linejoin: round } .legend { display: flex; flex-wrap: wrap; gap: 0 1rem }
.legend svg { display: inline-block; width: 22px; height: 8px; margin-right: .3rem }
""" + "".join(
    f".s{i} {{ stroke: var(--c{i}) }} circle.s{i} {{ fill: var(--c{i}); stroke: none }}\n" for i in range(NUM_COLOURS)
)


@dataclass(frozen=True)
class Line:
    name: str
    x: Sequence[float]
    y: Sequence[float]
    """NaN: the line has a gap"""
    dots: bool = False
    """Whether each point is marked, and says its value when pointed at."""


def line_chart(title: str, lines: Sequence[Line], x_label: str, limit: float | None = None) -> Html:
    """A chart whose axes begin at 0, or at the lowest value below it.

    Args:
        limit: where the y axis ends; None: at the highest value.
    """
    lines = [_thinned(line) for line in lines]
    points = [
        (x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)
    ]
    if not points:
        return tag("figure", tag("b", title), tag("p", "nothing was recorded", class_="soft"), class_="chart")
    x_low, x_high = _range(min(0.0, *(x for x, _ in points)), max(x for x, _ in points))
    x_ticks = _ticks(x_low, x_high, 6, outside=False)
    y_ticks = _ticks(min(0.0, *(y for _, y in points)), limit or max(y for _, y in points), 5, outside=limit is None)
    y_low, y_high = _range(min(0.0, y_ticks[0]), limit or y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_label(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{tag("tspan", x_label)}</text>')
    for number, line in enumerate(lines):
        parts += _drawn(line, number, place, x_label)
    drawing = Html("".join(parts))
    svg = tag("svg", drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    names = [tag("span", _sample(number), line.name) for number, line in enumerate(lines)] if len(lines) > 1 else []
    return tag("figure", tag("b", title), svg, tag("figcaption", *names, class_="legend"), class_="chart")


def _drawn(line: Line, number: int, place, x_label: str) -> list[str]:
    colour, dash = number % NUM_COLOURS, DASHES[number // NUM_COLOURS % len(DASHES)]
    parts, run = [], []
    for x, y in [*zip(line.x, line.y, strict=True), (math.nan, math.nan)]:
        if math.isfinite(x) and math.isfinite(y):
            across, down = place(x, y)
            run.append(f"{across:.1f},{down:.1f}")
            if line.dots:
                words = tag("title", f"{line.name}: {y:.4g} at {x_label} {x:.4g}")
                parts.append(f'<circle class="s{colour}" cx="{across:.1f}" cy="{down:.1f}" r="3.2">{words}</circle>')
        elif run:
            dots = f' stroke-dasharray="{dash}"' if dash else ""
            if len(run) > 1:
                words = tag("title", line.name)
                parts.append(f'<polyline class="s{colour}"{dots} points="{" ".join(run)}">{words}</polyline>')
            elif not line.dots:
                across, down = run[0].split(",")
                parts.append(f'<circle class="s{colour}" cx="{across}" cy="{down}" r="2.4"/>')
            run = []
    return parts


def _sample(number: int) -> Html:
    dash = DASHES[number // NUM_COLOURS % len(DASHES)]
    dots = f' stroke-dasharray="{dash}"' if dash else ""
    line = f'<line class="s{number % NUM_COLOURS}" x1="0" x2="22" y1="4" y2="4" stroke-width="2.5"{dots}/>'
    return Html(f'<svg viewBox="0 0 22 8" aria-hidden="true">{line}</svg>')


def _thinned(line: Line) -> Line:
    """With at most MOST_POINTS, each the mean of as many neighbours; a gap among them stays one."""
    size = -(-len(line.x) // MOST_POINTS)
    if size <= 1:
        return line
    starts = range(0, len(line.x), size)
    means = [[math.fsum(part) / len(part) for part in (v[i : i + size] for i in starts)] for v in (line.x, line.y)]
    return Line(line.name, *means, dots=line.dots)


def _range(low: float, high: float) -> tuple[float, float]:
    """With some width in any case."""
    if high - low > 1e-100:
        return low, high
    half = 0.5 * abs(low) if abs(low) > 1e-100 else 0.5
    return low - half, low + half


def _ticks(low: float, high: float, wanted: int, outside: bool) -> list[float]:
    """Round numbers, about `wanted`, between `low` and `high`; with `outside` one more beyond each end."""
    low, high = _range(low, high)
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    first, last = (
        low / step + 1e-9,
        high / step - 1e-9,
    )  # a limit that is a round number is one in spite of its last bit
    if outside:
        first, last = math.floor(first), math.ceil(last)
    else:
        first, last = math.ceil(first - 2e-9), math.floor(last + 2e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _label(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2g}"
    return f"{value:.4f}".rstrip("0").rstrip(".")
