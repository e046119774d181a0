"""Masks as polygons, with what that loses: rings along pixel borders, holes as rings of their own.

Coordinates are COCO's: the pixel in column c covers the interval from c to c + 1. A ring [n, 2] lists (x, y), its last
corner joined to its first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_api

from .data.outline import border_loops, simplify


@dataclass(frozen=True)
class Polygons:
    """One mask as rings. Filled by the even-odd rule all rings together give the mask, as exactly as `iou` says."""

    outer: list[np.ndarray]
    """Outlines of the parts, [n, 2] each. Pixels that touch by their corners only are parts of their own, and so is an
    island in a hole. Clockwise on the screen, where y points down."""
    holes: list[np.ndarray]
    """Outlines of the holes, [n, 2] each, counter-clockwise."""
    iou: float
    """Intersection over union of the mask and of what all rings give, drawn by COCO's tools: 1 when nothing is lost."""
    filled_iou: float
    """The same of what a format without holes gives, COCO's polygons or YOLO's: outer rings alone, holes filled."""

    def coco(self) -> list[list[float]]:
        """The outer rings as COCO's "segmentation": flat lists x1, y1, x2, y2, ...; it has no holes (`filled_iou`)."""
        return [ring.reshape(-1).tolist() for ring in self.outer]


def mask_polygons(rle: Mapping, tolerance: float = 0.0) -> Polygons:
    """The rings of one mask.

    Args:
        rle: COCO RLE, {"size": [H, W], "counts": bytes}. An empty mask has no rings, and its IoUs are 1.
        tolerance: 0: every corner of the pixel borders, exact; else corners are dropped that are not further, in
            pixels, than this from the line that remains (Douglas and Peucker 1973).
    """
    if tolerance < 0:
        raise ValueError(f"polygons: tolerance must be at least 0 pixels, got {tolerance}")
    x, y, width, height = mask_api.toBbox(rle).astype(int).tolist()
    if width == 0 or height == 0:
        return Polygons([], [], 1.0, 1.0)
    mask = mask_api.decode(rle)[y : y + height, x : x + width].astype(bool)  # all that follows is in the mask's own box
    outer, holes = [], []
    for loop in border_loops(mask):
        ring = _corners(loop, tolerance)
        after = np.roll(loop, -1, axis=0)
        is_hole = (loop[:, 0] * after[:, 1] - after[:, 0] * loop[:, 1]).sum() < 0
        (holes if is_hole else outer).append(ring)
    shift = np.array([x, y], np.float64)
    return Polygons(
        [ring + shift for ring in outer],
        [ring + shift for ring in holes],
        _iou(mask, draw_even_odd([*outer, *holes], height, width)),
        _iou(mask, draw_union(outer, height, width)),
    )


def draw_even_odd(rings: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """bool [height, width]: the pixels inside an odd number of rings [n, 2]; each ring is drawn by pycocotools."""
    mask = np.zeros((height, width), bool)
    for ring in rings:
        mask ^= _draw(ring, height, width)
    return mask


def draw_union(rings: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """bool [height, width]: the pixels inside any of the rings, which is what COCO's polygons mean."""
    mask = np.zeros((height, width), bool)
    for ring in rings:
        mask |= _draw(ring, height, width)
    return mask


def _draw(ring: np.ndarray, height: int, width: int) -> np.ndarray:
    return mask_api.decode(mask_api.frPyObjects([ring.reshape(-1).tolist()], height, width)[0]).astype(bool)


def _corners(loop: np.ndarray, tolerance: float) -> np.ndarray:
    """The corners of a loop [n, 2] of pixel edges; never fewer than 3."""
    before, after = np.roll(loop, 1, axis=0), np.roll(loop, -1, axis=0)
    ring = loop[(before + after != 2 * loop).any(axis=1)]
    if tolerance > 0:
        simple = simplify(ring, tolerance)
        ring = simple if len(simple) >= 3 else ring
    return ring


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.count_nonzero(a & b) / np.count_nonzero(a | b))
