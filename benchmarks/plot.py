"""One picture of a run: for every workload, how many times our time each other implementation takes."""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.report import OURS, Run, ratio

# Okabe and Ito, "Color Universal Design" (2008): told apart with every common colour blindness
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999")
LABELS, PLOT, NUMBERS = 460, 620, 90
"""Width in pixels of the workloads' names, of the logarithmic axis, and of the numbers right of it."""
ROW, TOP = 22, 92
MARGIN = 16


def draw(run: Run, path: Path) -> None:
    """Writes a PNG. A dot left of the line at 1 is a loss; the number at the right is the ratio to the fastest peer."""
    rows = [row for row in run.workloads if row.gain is not None]
    operators = dict.fromkeys(row.operator for row in rows)
    peers = dict.fromkeys(name for row in rows for name in row.peers)
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(peers)}
    ratios = [timing.median / row.ours.median for row in rows for timing in row.peers.values()]
    low, high = (round_out(min(ratios, default=1)), round_out(max(ratios, default=1)))
    low, high = min(low[0], 0.5), max(high[1], 2)

    size = (LABELS + PLOT + NUMBERS + 2 * MARGIN, TOP + ROW * (len(rows) + len(operators)) + 2 * MARGIN)
    image = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(13), ImageFont.load_default(16)

    def x(value: float) -> float:
        return MARGIN + LABELS + PLOT * math.log(value / low) / math.log(high / low)

    canvas.text((MARGIN, MARGIN), f"Time of the others / time of {OURS}: {run.title}", "black", large)
    canvas.text((size[0] - MARGIN, TOP - 4), "fastest", "black", small, anchor="rd")
    left = MARGIN
    for name, colour in colours.items():
        canvas.ellipse((left, 48, left + 10, 58), colour)
        canvas.text((left + 16, 45), name, "black", small)
        left += 40 + canvas.textlength(name, small)
    for value in axis(low, high):
        canvas.line((x(value), TOP, x(value), size[1] - MARGIN), "black" if value == 1 else "#dddddd")
        canvas.text((x(value), TOP - 4), f"{value:g}x", "black", small, anchor="md")

    y = TOP + MARGIN // 2
    for operator in operators:
        canvas.text((MARGIN, y), operator, "black", large)
        y += ROW
        for row in (row for row in rows if row.operator == operator):
            canvas.text((MARGIN + 14, y + ROW / 2), row.name, "#333333", small, anchor="lm")
            for name, timing in row.peers.items():
                centre = x(timing.median / row.ours.median)
                canvas.ellipse((centre - 5, y + ROW / 2 - 5, centre + 5, y + ROW / 2 + 5), colours[name])
            text = ratio(row.gain).strip("*").split(":")[0]
            colour = "#333333" if row.gain >= 1 else "#D55E00"
            canvas.text((size[0] - MARGIN, y + ROW / 2), text, colour, small, anchor="rm")
            y += ROW
    image.save(path)


def round_out(value: float) -> tuple[float, float]:
    """The numbers 1, 2, 5, 10 ... (and 0.5, 0.2 ...) just below and just above."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = [power * factor for factor in (1, 2, 5, 10)]
    return max(step for step in steps if step <= value * (1 + 1e-9)), min(step for step in steps if step >= value)


def axis(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
