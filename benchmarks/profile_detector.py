"""Where the time of a detector goes: a flame graph and two tables, from a profile of one image of 800 x 1333.

    python -m benchmarks.profile_detector scnet_r50_fpn_1x_coco
    python -m benchmarks.profile_detector scnet_r50_fpn_1x_coco --picture docs/profile_scnet_r50.svg \\
        --page docs/performance.md       rewrites what stands between its marks

The fastest of some runs is shown; the profiler itself takes a little of each. Weights and image are random, as in
bench_models.py.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch
from torch import nn

from benchmarks.conftest import processor
from benchmarks.detector_cases import IMAGE_SIZE, random_images, row_detector
from benchmarks.report import markdown
from docs.figures import BLUE, GREY, INK, ORANGE, Drawing
from models.folding import folded
from models.inference import unpack_detections
from models.published_rows import PUBLISHED_ROWS

MODULE, MATRIX, OURS, REST = "a module", "convolutions and linear layers", "operators of CascadeOps", "everything else"
COLOURS = {MODULE: "#f4f4f4", MATRIX: BLUE, OURS: ORANGE, REST: GREY}
MATRIX_OPERATORS = re.compile(r"aten::(conv\w*|_?mkldnn\w*|linear|matmul|mm|bmm|addmm|einsum)$")
PREFIX = "module "
IDLE = 0.5
"""Load average up to which a machine is called idle."""
NARROWEST = 5e-4
"""Share of the whole below which a span is not drawn."""


@dataclass
class Span:
    """A module's forward pass, or an operator that Python called."""

    name: str
    start: float
    """microseconds"""
    end: float
    kind: str
    children: list[Span] = field(default_factory=list)

    @property
    def duration(self) -> float:
        return self.end - self.start

    def times(self) -> Counter[str]:
        """Kind -> microseconds in it. What a module does between its operators is Python's, and so the rest."""
        if self.kind != MODULE:
            return Counter({self.kind: self.duration})
        own = self.duration - sum(child.duration for child in self.children)
        return sum((child.times() for child in self.children), Counter({REST: own}))


def profiled(detector: nn.Module, images: torch.Tensor, sizes: torch.Tensor, runs: int) -> Span:
    """The fastest of `runs` forward passes, to run lengths on the host, after one that is not looked at."""
    hooks = [hook for name, module in detector.named_modules() if name for hook in _name_module(module, name)]
    image_sizes = [tuple(size) for size in sizes.tolist()]
    found = []
    try:
        for run in range(runs + 1):
            profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            with torch.inference_mode(), profiler, torch.profiler.record_function(PREFIX + "detector"):
                detections = detector(images, sizes)
                with torch.profiler.record_function(PREFIX + "results"):
                    unpack_detections(detections, sizes, image_sizes)
            if run:
                found.append(_tree(profiler.events()))
    finally:
        for hook in hooks:
            hook.remove()
    return min(found, key=lambda span: span.duration)


def _name_module(module: nn.Module, name: str) -> list:
    """Hooks that record the module's forward pass under its name."""
    ranges = []

    def before(*_):
        ranges.append(torch.profiler.record_function(PREFIX + name))
        ranges[-1].__enter__()

    def after(*_):
        ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _tree(events) -> Span:
    """The whole forward pass. Operators that operators call are left out."""
    spans: dict[int, Span | None] = {}
    (root,) = [event for event in events if event.name == PREFIX + "detector"]
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):
        parent = spans.get(event.cpu_parent.id) if event.cpu_parent else None
        if event is not root and (parent is None or parent.kind != MODULE):
            continue
        name = event.name.removeprefix(PREFIX)
        span = Span(name, event.time_range.start, event.time_range.end, _kind(event.name))
        spans[event.id] = span
        if parent:
            parent.children.append(span)
    return spans[root.id]


def _kind(name: str) -> str:
    if name.startswith(PREFIX):
        return MODULE
    if name.startswith("cascadeops::"):
        return OURS
    return MATRIX if MATRIX_OPERATORS.match(name) else REST


def parts(root: Span) -> dict[str, float]:
    """Share of the whole by part of the detector: its modules, our operators that it calls, and what is between."""
    shares: Counter[str] = Counter()
    for child in root.children:
        name = child.name.partition(".")[0] if child.kind == MODULE else child.name
        shares[name if child.kind in (MODULE, OURS) else "between them"] += child.duration
    shares["between them"] += root.duration - sum(child.duration for child in root.children)
    return {name: time / root.duration for name, time in shares.most_common()}


def kinds(root: Span) -> dict[str, float]:
    times = root.times()
    return {kind: times[kind] / root.duration for kind in (MATRIX, OURS, REST)}


def flame(root: Span, title: str) -> Drawing:
    """Time goes to the right; below a module is what it calls."""
    width, row, top = 1200, 20, 70

    def depth(span: Span) -> int:
        return 1 + max(map(depth, span.children), default=0)

    drawing = Drawing(width, top + row * depth(root) + 10)
    drawing.text(10, 24, escape(title), size=16, anchor="start")
    left = 10
    for kind, colour in COLOURS.items():
        drawing.box(left, 40, left + 14, 54, INK, colour, width=0.5)
        drawing.text(left + 20, 52, kind, anchor="start")
        left += 50 + 7 * len(kind)
    scale = (width - 20) / root.duration

    def draw(span: Span, level: int, above: str) -> None:
        x1, x2 = (10 + (moment - root.start) * scale for moment in (span.start, span.end))
        if span.duration < NARROWEST * root.duration:
            return
        y = top + row * level
        drawing.box(x1, y, x2, y + row - 1, INK, COLOURS[span.kind], width=0.2)
        label = span.name.rpartition("::")[2].removeprefix(above + ".")
        label = label if 7 * len(label) < x2 - x1 else label.rpartition(".")[2]
        if 7 * len(label) < x2 - x1:
            colour = INK if span.kind == MODULE else "white"
            drawing.text((x1 + x2) / 2, y + 14, escape(label), colour, size=11)
        for child in span.children:
            draw(child, level + 1, span.name)

    draw(root, 0, "")
    return drawing


def tables(row: str, root: Span, load: float) -> str:
    """Markdown: the machine (`load`: processes that ran on it before), shares by kind of work, and shares by part."""
    conditions = (
        f"`{row}`, one image of {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]}, float32: {root.duration / 1e6:.2f} s under the "
        f"profiler; {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}."
    )
    if load > IDLE:
        conditions += f" **The machine was busy** (load average {load:.1f}): the shares count, not the seconds."
    by_kind = markdown(["kind of work", "share"], [[kind, f"{share:.1%}"] for kind, share in kinds(root).items()])
    shown = [[f"`{part}`", f"{share:.1%}"] for part, share in parts(root).items() if share >= 0.001]
    return f"{conditions}\n\n{by_kind}\n\n{markdown(['part', 'share'], shown)}"


def rewritten(text: str, row: str, content: str) -> str:
    """`text` with the section of the row made anew; ValueError if it has none."""
    mark = re.compile(rf"(<!-- profile: {re.escape(row)} -->\n).*?(<!-- /profile -->)", re.DOTALL)
    if not mark.search(text):
        raise ValueError(f"no section between <!-- profile: {row} --> and <!-- /profile -->")
    return mark.sub(lambda match: f"{match[1]}\n{content}\n\n{match[2]}", text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_detector",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("row", metavar="ROW", help="a published row; `python -m models.train --list` shows them")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--picture", type=Path, metavar="FILE.svg")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="a page with marks")
    options = parser.parse_args(arguments)
    if options.row not in PUBLISHED_ROWS:
        parser.error(f"no published row: {options.row}")
    load = os.getloadavg()[0]
    root = profiled(folded(row_detector(options.row)), *random_images(1, IMAGE_SIZE), options.runs)
    content = tables(options.row, root, load)
    print(content)
    if options.picture:
        options.picture.write_text(flame(root, f"{options.row}: {root.duration / 1e6:.2f} s").svg())
    if options.page:
        try:
            options.page.write_text(rewritten(options.page.read_text(), options.row, content))
        except ValueError as error:
            parser.error(f"{options.page}: {error}")


if __name__ == "__main__":
    main()
