"""COCO's polygon drawing, step by step: a chain of grid points along the outline, and flips where it changes column."""

import itertools
import math

import torch
from torch import Tensor

FINE = 5
"""Grid lines to a cell."""


def polygon_mask_targets(
    vertices: Tensor,  # float32 [V, 2] (x, y)
    polygon_offsets: Tensor,  # int64 [P + 1]
    object_offsets: Tensor,  # int64 [G + 1]
    boxes: Tensor,  # float32 [K, 4]
    index: Tensor,  # int64 [K]
    output_size: int,
) -> Tensor:
    targets = torch.zeros(len(boxes), output_size, output_size, dtype=torch.uint8)
    for target, (x1, y1, x2, y2), g in zip(targets, boxes.double().tolist(), index.tolist(), strict=True):
        per_x, per_y = output_size / max(x2 - x1, 0.1), output_size / max(y2 - y1, 0.1)
        for p in range(object_offsets[g], object_offsets[g + 1]) if g >= 0 else ():
            polygon = vertices[polygon_offsets[p] : polygon_offsets[p + 1]].double().tolist()
            moved = [((x - x1) * per_x, (y - y1) * per_y) for x, y in polygon]
            target |= draw_polygon(moved, output_size)
    return targets


def draw_polygon(polygon: list[tuple[float, float]], size: int) -> Tensor:
    """Vertices (x, y) in cells -> uint8 [size, size]."""
    corners = [(int(FINE * x + 0.5), int(FINE * y + 0.5)) for x, y in polygon]
    outline = [
        point for start, end in zip(corners, corners[1:] + corners[:1], strict=True) for point in chain(start, end)
    ]
    flips = torch.zeros(size + 1, size, dtype=torch.int64)
    for (x0, y0), (x1, y1) in itertools.pairwise(outline):
        if x0 == x1:
            continue
        column = (min(x0, x1) + 0.5) / FINE - 0.5
        if column == int(column) and 0 <= column < size:
            row = (min(y0, y1) + 0.5) / FINE - 0.5
            flips[math.ceil(min(max(row, 0), size)), int(column)] += 1
    return (flips.cumsum(0)[:size] % 2).to(torch.uint8)


def chain(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The grid points nearest to an edge, one for each grid line along its longer side, from start to end."""
    (x0, y0), (x1, y1) = start, end
    width, height = abs(x1 - x0), abs(y1 - y0)
    if width >= height:
        if x0 > x1:
            return chain(end, start)[::-1]
        slope = (y1 - y0) / max(width, 1)
        return [(x0 + step, int(y0 + slope * step + 0.5)) for step in range(width + 1)]
    if y0 > y1:
        return chain(end, start)[::-1]
    slope = (x1 - x0) / height
    return [(int(x0 + slope * step + 0.5), y0 + step) for step in range(height + 1)]
