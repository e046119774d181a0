"""Polygons of a mask: the outline between pixels is traced, then simplified.

The polygons follow COCO's convention: flat lists x1, y1, x2, y2, ... in pixels, where the pixel in column c covers
the interval from c to c + 1.
"""

import numpy as np
from pycocotools import mask as coco_mask


def outline_polygons(mask: np.ndarray, tolerance: float = 0.4, agreement: float = 0.96) -> list[list[float]] | None:
    """Polygons that rasterise to nearly `mask` (bool [H, W]), one for each part; None if that is not possible.

    It is not possible when a part has a hole, or when the mask of the polygons and `mask` have an IoU below
    `agreement` (very small or ragged parts). `tolerance` is how far, in pixels, a dropped vertex may be away.
    """
    polygons = []
    for loop in border_loops(mask):
        x, y = loop[:, 0], loop[:, 1]
        if (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() < 0:
            return None  # a loop that runs the other way round bounds a hole
        middles = (
            loop + np.roll(loop, -1, axis=0)
        ) / 2  # of the pixel edges: straight along diagonals, unlike the corners
        corners = simplify(middles, tolerance)
        if len(corners) < 3:
            return None
        polygons.append([float(value) for value in corners.reshape(-1)])
    drawn = rasterise(polygons, *mask.shape)
    union = np.count_nonzero(drawn | mask)
    return polygons if union and np.count_nonzero(drawn & mask) >= agreement * union else None


def rasterise(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """The mask (bool [height, width]) that COCO's tools see in `polygons`."""
    if not polygons:
        return np.zeros((height, width), bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def border_loops(mask: np.ndarray) -> list[np.ndarray]:
    """Closed outlines [n, 2] (x, y) of `mask` along pixel edges, the inside on the right hand (y points down)."""
    padded = np.pad(mask, 1).astype(np.int8)
    step_down, step_right = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1]
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def add(rows, columns, start, end):
        for r, c in zip(rows.tolist(), columns.tolist(), strict=True):
            edges.setdefault((c + start[0], r + start[1]), []).append((c + end[0], r + end[1]))

    add(*np.nonzero(step_down == 1), (0, 0), (1, 0))  # top edge of a pixel: to the right
    add(*np.nonzero(step_down == -1), (1, 0), (0, 0))  # bottom edge: to the left
    add(*np.nonzero(step_right == -1), (0, 0), (0, 1))  # right edge: down
    add(*np.nonzero(step_right == 1), (0, 1), (0, 0))  # left edge: up

    loops = []
    while edges:
        start = next(iter(edges))
        point, before, loop = start, None, []
        while point in edges:
            ways = edges[point]
            onward = ways[0]
            if len(ways) == 2 and before is not None:
                # Two pixels touch by their corners only: turn right, which keeps them apart.
                heading = (point[0] - before[0], point[1] - before[1])
                onward = (point[0] - heading[1], point[1] + heading[0])
            ways.remove(onward)
            if not ways:
                del edges[point]
            loop.append(point)
            point, before = onward, point
            if point == start and len(loop) >= 4:
                break
        loops.append(np.array(loop, np.float64))
    return loops


def simplify(points: np.ndarray, tolerance: float) -> np.ndarray:
    """Douglas-Peucker on a closed line [n, 2]: no dropped point is further than `tolerance` from the result."""
    line = points[:, 0] + 1j * points[:, 1]
    closed = np.append(line, line[0])
    far = int(np.argmax(np.abs(line - line[0])))
    keep = np.zeros(len(points), bool)
    keep[[0, far]] = True
    todo = [(0, far), (far, len(points))]
    while todo:
        first, last = todo.pop()
        if last - first < 2:
            continue
        along = complex(closed[last] - closed[first])
        # With the imaginary part of a product as the cross product: |along| times the distance from the chord.
        beside = np.abs(((closed[first + 1 : last] - closed[first]) * along.conjugate()).imag)
        worst = int(beside.argmax())
        if beside[worst] > tolerance * abs(along):
            middle = first + 1 + worst
            keep[middle] = True
            todo += [(first, middle), (middle, last)]
    return points[keep]
