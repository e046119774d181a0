"""Segmentations as COCO writes them (polygons, run lengths), checked once, packed into arrays, decoded on demand.

pycocotools does the drawing, so that a mask here is pixel for pixel the mask that the evaluation sees; but it trusts
its input (malformed run lengths can end the process), so everything is checked before it gets there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

LARGEST_COORDINATE = 1e5
"""Polygons with a coordinate beyond this are refused: pycocotools would allocate memory in proportion to it."""


class MalformedAnnotation(ValueError):
    """The text says what is wrong; the caller knows the file and the annotation and raises DataError."""


def run_lengths(counts: bytes) -> np.ndarray:
    """The run lengths int64 [n] in COCO's compressed text: 5 bits a character, signed, from the third run on as the
    difference to the run before the last (maskApi.c, rleFrString)."""
    code = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not code.size:
        return code
    if code.min() < 0 or code.max() > 63 or code[-1] & 32:
        raise MalformedAnnotation("the run lengths are not COCO's compressed text")
    first = np.concatenate([[0], np.flatnonzero((code[:-1] & 32) == 0) + 1])
    position = np.arange(code.size) - np.repeat(first, np.diff([*first, code.size]))
    if position.max() > 5:  # pycocotools shifts beyond its 32 bits; no image has runs that long
        raise MalformedAnnotation("a run length is too long a number")
    values = np.add.reduceat((code & 31) << (5 * position), first)
    last = np.concatenate([first[1:], [code.size]]) - 1
    values -= np.where(code[last] & 16, np.int64(1) << (5 * (position[last] + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def checked_run_lengths(segmentation: dict, height: int, width: int) -> bytes:
    """COCO's compressed text of `segmentation` ({"size", "counts"}), which must describe a mask [height, width]."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if list(size or ()) != [height, width]:
        raise MalformedAnnotation(
            f"the run lengths are for size {size}, the image is {[height, width]} (height, width)"
        )
    if isinstance(counts, list):
        if not all(type(run) is int and run >= 0 for run in counts):
            raise MalformedAnnotation("run lengths must be whole numbers, 0 or more")
        runs = np.array(counts, np.int64)
    elif isinstance(counts, str) and counts.isascii():
        runs = run_lengths(counts.encode())
    else:
        raise MalformedAnnotation(f"counts must be a list or a text, got {type(counts).__name__}")
    if (runs.size and runs.min() < 0) or runs.sum() != height * width:
        raise MalformedAnnotation(f"the run lengths cover {runs.sum()} pixels, the image has {height * width}")
    if isinstance(counts, str):
        return counts.encode()
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]


def usable_polygons(segmentation: list) -> list[list[float]]:
    """The polygons of 3 points or more with an x and a y for each; the others are dropped, as mmdetection does."""
    kept = []
    for polygon in segmentation:
        if not isinstance(polygon, list) or not {*map(type, polygon)} <= {int, float}:
            raise MalformedAnnotation("a polygon must be a flat list of numbers x1, y1, x2, y2, ...")
        if max(map(abs, polygon), default=0) > LARGEST_COORDINATE:
            raise MalformedAnnotation(f"a polygon has a coordinate beyond {LARGEST_COORDINATE:.0f} pixels")
        if len(polygon) >= 6 and len(polygon) % 2 == 0:
            kept.append(polygon)
    return kept


@dataclass(frozen=True)
class PackedSegmentations:
    """The segmentations of all objects, in four arrays.

    Object i has the parts part_offsets[i] .. part_offsets[i + 1]; part p is the slice spans[p] of
    `coordinates` (a polygon) or, where is_text[i], of `text` (compressed run lengths, one part).
    """

    part_offsets: np.ndarray  # int64 [A + 1]
    spans: np.ndarray  # int64 [P, 2] (start, end)
    is_text: np.ndarray  # bool [A]
    text: np.ndarray  # uint8
    coordinates: np.ndarray  # float64, or int32 in hundredths of a pixel; float32 would move some outlines by a pixel

    def decode(self, index: int, height: int, width: int) -> np.ndarray:
        """The mask of object `index`: uint8 [height, width], 0 or 1, in column-major order."""
        parts = range(self.part_offsets[index], self.part_offsets[index + 1])
        spans = [slice(*self.spans[part]) for part in parts]
        if self.is_text[index]:
            runs = {"size": [height, width], "counts": self.text[spans[0]].tobytes()}
        else:
            unit = 100 if self.coordinates.dtype == np.int32 else 1
            polygons = [(self.coordinates[span] / unit).tolist() for span in spans]
            runs = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        return coco_mask.decode(runs)


def pack_segmentations(segmentations: Sequence[list[list[float]] | bytes]) -> PackedSegmentations:
    """Pack checked segmentations: polygons, or compressed run lengths as bytes."""
    part_offsets, spans, is_text = [0], [], []
    texts, coordinates = [], []
    text_end = coordinate_end = 0
    for segmentation in segmentations:
        is_text.append(isinstance(segmentation, bytes))
        if is_text[-1]:
            texts.append(segmentation)
            spans.append((text_end, text_end := text_end + len(segmentation)))
        else:
            for polygon in segmentation:
                coordinates.append(np.array(polygon, np.float64))
                spans.append((coordinate_end, coordinate_end := coordinate_end + len(polygon)))
        part_offsets.append(len(spans))
    return PackedSegmentations(
        np.array(part_offsets, np.int64),
        np.array(spans, np.int64).reshape(-1, 2),
        np.array(is_text, bool),
        np.frombuffer(b"".join(texts), np.uint8),
        _pack_coordinates(np.concatenate(coordinates)) if coordinates else np.zeros(0),
    )


def _pack_coordinates(values: np.ndarray) -> np.ndarray:
    """Half the memory where every value has two decimals at most, as in COCO: hundredths give back the same numbers."""
    hundredths = np.round(values * 100)
    return hundredths.astype(np.int32) if np.array_equal(hundredths / 100, values) else values
