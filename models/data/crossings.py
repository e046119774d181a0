"""Polygons whose outline crosses itself."""

import numpy as np

MAX_POINTS = 2000
"""Every pair of sides is looked at, so longer outlines are not checked (COCO's longest has 800 points)."""


def crosses_itself(polygon: list[float]) -> bool:
    """Whether two sides of the closed outline x1, y1, x2, y2, ... cross at a point that is an end of neither."""
    points = np.asarray(polygon, np.float64).reshape(-1, 2)
    if not 4 <= len(points) <= MAX_POINTS:
        return False
    start, end = points, np.roll(points, -1, axis=0)
    sides = _side(start[:, None], end[:, None], start[None]), _side(start[:, None], end[:, None], end[None])
    apart = sides[0] * sides[1] < 0  # [i, j]: the ends of side j lie on different sides of the line through side i
    return bool((apart & apart.T).any())


def _side(a: np.ndarray, b: np.ndarray, points: np.ndarray) -> np.ndarray:
    """-1, 0 or 1: on which side of the line from a to b the points lie."""
    left = (b[..., 0] - a[..., 0]) * (points[..., 1] - a[..., 1])
    return np.sign(left - (b[..., 1] - a[..., 1]) * (points[..., 0] - a[..., 0]))
