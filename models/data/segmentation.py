"""Segmentations as COCO writes them (polygons, run lengths), checked once, packed into arrays, decoded on demand.

pycocotools does the drawing, so that a mask here is pixel for pixel the mask that the evaluation sees; but it trusts
its input (malformed run lengths can end the process), so everything is checked before it gets there.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from pycocotools import mask as coco_mask

LARGEST_COORDINATE = 1e5
"""Polygons with a coordinate beyond this are refused: pycocotools would allocate memory in proportion to it."""

LONGEST_OUTLINE = 2_000_000
"""Pixels of all outlines of an object: pycocotools takes 80 bytes for each, and ends the process where it gets none."""

MOST_DRAWN_PIXELS = 3 * 2**24 - 1
"""Of an image with polygons, bitmaps or plain run lengths. pycocotools takes 6 bytes for the text of a run, and ends
the text with one more: with runs of 2^24 pixels, as only larger images have, it writes that one into memory that is not
its own."""


_NUMBERS = frozenset((int, float))


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
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise MalformedAnnotation(
            f"the run lengths are for size {size}, the image is {[height, width]} (height, width)"
        )
    pixels = height * width
    if isinstance(counts, list):
        check_drawable(height, width)
        if not all(type(run) is int and run >= 0 for run in counts):
            raise MalformedAnnotation("run lengths must be whole numbers, 0 or more")
        covered, size = sum(counts), len(counts)
        fits = covered == pixels
    elif isinstance(counts, str) and counts.isascii():
        runs = run_lengths(counts.encode())
        # Each by itself, because the sum of longer ones may wrap around to what is right.
        fits = runs.size > 0 and runs.min() >= 0 and runs.max() <= pixels and runs.sum() == pixels
        covered, size = pixels if fits else sum(runs.tolist()), runs.size
    else:
        raise MalformedAnnotation(f"counts must be a list or a text, got {type(counts).__name__}")
    if not fits:
        raise MalformedAnnotation(f"the run lengths cover {covered} pixels, the image has {pixels}")
    if size > pixels + 1:  # pycocotools has room for no more
        raise MalformedAnnotation(f"there are {size} run lengths, the image has {pixels} pixels")
    if isinstance(counts, str):
        return counts.encode()
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]


def check_drawable(height: int, width: int) -> None:
    """MalformedAnnotation for an image in which pycocotools cannot draw, see MOST_DRAWN_PIXELS."""
    if height * width > MOST_DRAWN_PIXELS:
        why = f"masks of images beyond {MOST_DRAWN_PIXELS:,} pixels must be compressed run lengths"
        raise MalformedAnnotation(f"{why}, the image is {[height, width]} (height, width)")


def are_numbers(values: Sequence) -> bool:
    """Whether all are int or float, and none a bool."""
    return _NUMBERS.issuperset(map(type, values))


def beyond(values: list[float], limit: float) -> bool:
    """Whether any of the numbers is further from 0 than `limit`. At least one is needed."""
    return max(values) > limit or min(values) < -limit  # three times as fast as a generator over all


def are_long_enough(segmentation: list) -> bool:
    """Whether all polygons have 3 points or more and an x and a y for each."""
    for polygon in segmentation:  # noqa: SIM110 - asked a million times, and a generator takes twice as long
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return False
    return True


def usable_polygons(segmentation: list) -> list[list[float]]:
    """The polygons of 3 points or more with an x and a y for each; the others are dropped, as mmdetection does."""
    kept, bound = [], 0.0
    for polygon in segmentation:
        if not isinstance(polygon, list) or not are_numbers(polygon):
            raise MalformedAnnotation("a polygon must be a flat list of numbers x1, y1, x2, y2, ...")
        largest = max(max(polygon), -min(polygon)) if polygon else 0
        if largest > LARGEST_COORDINATE:
            raise MalformedAnnotation(f"a polygon has a coordinate beyond {LARGEST_COORDINATE:.0f} pixels")
        if len(polygon) >= 6 and len(polygon) % 2 == 0:
            kept.append(polygon)
            bound += len(polygon) * largest  # a side, for which there are two coordinates, is at most 2 * largest long
    if bound > LONGEST_OUTLINE and (outline := sum(map(outline_length, kept))) > LONGEST_OUTLINE:
        raise MalformedAnnotation(f"its outlines have {outline:.0f} pixels, more than {LONGEST_OUTLINE:,}")
    return kept


def outline_length(polygon: list[float]) -> float:
    """Pixels that pycocotools walks along a polygon: the longer of the two differences of each side."""
    points = np.array(polygon, np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


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


class SegmentationPacker:
    """Packs segmentations one after the other: polygons, or checked run lengths as bytes.

    `add` raises TypeError or OverflowError for polygons that are no lists of numbers.
    """

    def __init__(self) -> None:
        self._part_counts, self._ends, self._is_text = array("q"), array("q"), array("B")
        self._text, self._coordinates = bytearray(), array("d")
        self._packed: list[np.ndarray] = []  # blocks of coordinates
        self._packed_length = 0
        self._most = 0  # coordinates of an object since the last block

    def add(self, segmentation: list[list[float]] | bytes) -> None:
        if isinstance(segmentation, bytes):
            self._text += segmentation
            self._ends.append(len(self._text))
            self._part_counts.append(1)
            self._is_text.append(1)
            return
        before = len(self._coordinates)
        for polygon in segmentation:
            self._coordinates.fromlist(polygon)
            self._ends.append(self._packed_length + len(self._coordinates))
        self._most = max(self._most, len(self._coordinates) - before)
        self._part_counts.append(len(segmentation))
        self._is_text.append(0)

    def add_polygons(self, segmentations: list[list[list[float]]]) -> None:
        """As `add` for each of them, in a third of the time."""
        polygons = [*chain.from_iterable(segmentations)]
        start = self._packed_length + len(self._coordinates)
        for polygon in polygons:
            self._coordinates.fromlist(polygon)
        lengths, counts = np.array([*map(len, polygons)]), np.array([*map(len, segmentations)])
        if counts.size:
            self._most = max(self._most, int(np.add.reduceat(lengths, np.cumsum(counts) - counts).max()))
        ends = start + np.cumsum(lengths, dtype=np.int64)
        self._ends.frombytes(ends.tobytes())
        self._part_counts.extend(counts.tolist())
        self._is_text.frombytes(bytes(len(segmentations)))

    def pack_block(self) -> bool:
        """Packs the coordinates that were added since the last call. Whether one of them, or the outline of an object,
        may be beyond its limit; `usable_polygons` knows."""
        values = np.array(self._coordinates)
        largest = float(np.abs(values).max(initial=0))
        good = largest <= LARGEST_COORDINATE  # False for NaN
        # a side of a polygon, which takes two of the coordinates, is at most twice the largest of them long
        doubtful = not good or self._most * largest > LONGEST_OUTLINE
        self._packed.append(_pack_coordinates(values) if good else values)
        self._packed_length += values.size
        self._coordinates, self._most = array("d"), 0
        return doubtful

    def packed(self, order: np.ndarray | None = None) -> PackedSegmentations:
        """The segmentations in the given order; None: as they were added. `order` is int64 [A]."""
        self.pack_block()
        counts, is_text = np.array(self._part_counts, np.int64), np.array(self._is_text, bool)
        ends = np.array(self._ends, np.int64)
        spans = np.stack([np.zeros_like(ends), ends], axis=1)
        of_text = np.repeat(is_text, counts)
        for chosen in (of_text, ~of_text):  # each part starts where the one before it, of its kind, ends
            spans[chosen, 0] = np.concatenate([[0], ends[chosen][:-1]])[: chosen.sum()]
        if order is not None:
            first = (np.cumsum(counts) - counts)[order]
            counts, is_text = counts[order], is_text[order]
            start = np.cumsum(counts) - counts
            spans = spans[np.repeat(first - start, counts) + np.arange(counts.sum())]
        return PackedSegmentations(
            np.concatenate([[0], np.cumsum(counts)]),
            spans,
            is_text,
            np.frombuffer(bytes(self._text), np.uint8),
            _joined(self._packed),
        )


def pack_segmentations(segmentations: Sequence[list[list[float]] | bytes]) -> PackedSegmentations:
    """Pack checked segmentations."""
    packer = SegmentationPacker()
    for segmentation in segmentations:
        packer.add(segmentation)
    return packer.packed()


def _joined(blocks: list[np.ndarray]) -> np.ndarray:
    if any(block.dtype != np.int32 for block in blocks):
        blocks = [block / 100 if block.dtype == np.int32 else block for block in blocks]
    return np.concatenate(blocks)


def _pack_coordinates(values: np.ndarray) -> np.ndarray:
    """Half the memory where every value has two decimals at most, as in COCO: hundredths give back the same numbers."""
    hundredths = np.round(values * 100)
    return hundredths.astype(np.int32) if np.array_equal(hundredths / 100, values) else values
