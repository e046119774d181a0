"""Numbers of a report as text, and tables of one run's or of two runs' values."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence

from .page import Html, table, tag

STYLE = """
td.bar { background: linear-gradient(to right, var(--bar) calc(var(--v) * 100%), transparent 0) }
td.heat { text-align: right; background: rgb(var(--heat) / calc(var(--v) * 75%)) }
.better { color: var(--better) } .worse { color: var(--worse) }
.confusion th { vertical-align: bottom } .confusion thead th { writing-mode: vertical-rl; transform: rotate(180deg);
  text-align: left; padding: .6rem .2rem; max-height: 12rem } .confusion thead th:first-child { writing-mode: initial;
  transform: none } .confusion td.zero { color: var(--line) }
"""


def number(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def clock(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def moment(time: float) -> str:
    return datetime.datetime.fromtimestamp(time, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")


def bar(value: float, digits: int = 3) -> Html:
    """A cell whose background shows a value in 0..1."""
    share = 0.0 if math.isnan(value) else min(1.0, max(0.0, value))
    return tag("td", number(value, digits), class_="number bar", style=f"--v:{share:.3f}")


def heat(count: int, share: float) -> Html:
    """A cell of a matrix, dark by `share` in 0..1."""
    return tag("td", f"{count:,}", class_="heat" if count else "number zero", style=f"--v:{share:.3f}")


def difference(first: float, second: float, digits: int = 3, higher_is_better: bool = True) -> Html:
    """A cell that says by how much the second is above the first."""
    change = second - first
    if math.isnan(change) or round(change, digits) == 0:
        return tag("td", "-" if math.isnan(change) else f"{0:.{digits}f}", class_="number")
    kind = "better" if (change > 0) == higher_is_better else "worse"
    return tag("td", tag("span", f"{change:+.{digits}f}", class_=kind), class_="number")


def comparison(names: Sequence[str], rows: Sequence[tuple[object, Sequence[str]]]) -> Html:
    """A table of texts: a row for each (what, its value in each run)."""
    headings = ["", *names] if len(names) > 1 else []
    return table(headings, [(what, *values) for what, values in rows])
