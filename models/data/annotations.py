"""COCO annotation files: read, checked, cleaned, and packed into arrays.

Python objects are not kept: a forked worker that only reads them would still write their reference counts, and so
copy all of their memory; arrays stay shared.
"""

import contextlib
import gc
import re
from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..images import MAX_PIXELS
from .annotation_columns import Columns, take_columns
from .annotation_json import in_chunks, read_in_chunks
from .segmentation import (
    LARGEST_COORDINATE,
    MalformedAnnotation,
    PackedSegmentations,
    SegmentationPacker,
    are_long_enough,
    are_numbers,
    beyond,
    check_drawable,
    checked_run_lengths,
    usable_polygons,
)

REQUIRED = {
    "images": dict.fromkeys(("id", "height", "width")).keys(),
    "annotations": dict.fromkeys(("id", "image_id", "category_id", "bbox")).keys(),
    "categories": dict.fromkeys(("id", "name")).keys(),
}

LONGEST_NAME = 1000
"""Characters of an image's file name: each image gets as many bytes as the longest name has."""

MOST_CLASSES = 2**15 - 1
"""Labels are int16."""

EXPORT = "export the data set as COCO instances (images, annotations, categories)"


@dataclass(frozen=True)
class Annotations:
    """The usable objects of an annotation file, sorted by image. I images, A objects, C categories."""

    class_names: tuple[str, ...]  # by label
    category_ids: np.ndarray  # int64 [C], ascending: category_ids[label] is the file's id
    image_ids: np.ndarray  # int64 [I]
    file_names: np.ndarray  # UTF-8 bytes [I]
    sizes: np.ndarray  # int32 [I, 2] (height, width)
    annotated: np.ndarray  # bool [I]: has any annotation, even a crowd or one that the cleaning dropped
    object_offsets: np.ndarray  # int64 [I + 1]: image i has the objects object_offsets[i] .. object_offsets[i + 1]
    boxes: np.ndarray  # float32 [A, 4] (x1, y1, x2, y2), pixels
    labels: np.ndarray  # int16 [A]
    annotation_ids: np.ndarray  # int64 [A]
    segmentations: PackedSegmentations | None  # None: only the boxes were read
    num_stuff_ids: int | None  # highest id in the file's own list of stuff classes, plus one; None without such a list
    left_out: tuple[tuple[str, int], ...]  # (reason, count) of the annotations that are not among the objects

    def nbytes(self) -> int:
        """Memory of all arrays, in bytes."""
        arrays = [*vars(self).values(), *(vars(self.segmentations).values() if self.segmentations else ())]
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


def read_annotations(path: Path, boxes_only: bool = False) -> Annotations:
    """Read the COCO annotation file at `path`.

    An object is usable when it is no crowd, not marked "ignore", has an area above 0, a box of at least 1 x 1 pixel
    that meets the image, and a mask: run lengths, or at least one polygon of 3 points or more. The others are left
    out, as mmdetection does, and counted. What cannot be right is refused.

    Args:
        boxes_only: masks are neither needed nor kept.

    Raises:
        DataError: not JSON, not COCO, unknown or repeated ids, numbers that are none, malformed masks.
    """
    content, chunks = read_in_chunks(path)
    return _pack(content, chunks, path, boxes_only)


def pack_annotations(content: dict, path: Path, boxes_only: bool = False) -> Annotations:
    """The usable objects of an annotation file's content; `path` is what messages call it. As read_annotations."""
    content = dict(content)
    return _pack(content, in_chunks(content.pop("annotations")), path, boxes_only)


def _pack(content: object, chunks: Iterable[list] | None, path: Path, boxes_only: bool) -> Annotations:
    _check_keys(content, path)
    if chunks is None:
        raise _not_coco(f'it has no list "annotations"; its keys are {_shorten(sorted(content))}', path)
    categories = _by_id(content["categories"], "categories", path)
    if len(categories) > MOST_CLASSES:
        why = f"{len(categories):,}, at most {MOST_CLASSES:,}"
        raise DataError("the annotation file has too many categories", where=path, why=why)
    images = _by_id(content["images"], "images", path)
    sizes = [annotated_size(image, path) for image in images.values()]
    objects = _Objects(list(images), sizes, sorted(categories), path, boxes_only)
    with _no_garbage_collection():
        for chunk in chunks:
            objects.add(chunk)
    order = np.lexsort((objects.places, objects.rows))  # by image; an image's as in the file
    return Annotations(
        class_names=tuple(str(categories[category]["name"]) for category in sorted(categories)),
        category_ids=np.array(sorted(categories), np.int64),
        image_ids=np.array(list(images), np.int64),
        file_names=np.array([_file_name(image, path).encode() for image in images.values()], dtype=np.bytes_),
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        annotated=objects.annotated,
        object_offsets=np.concatenate([[0], np.cumsum(np.bincount(objects.rows, minlength=len(images)))]),
        boxes=np.frombuffer(objects.boxes).reshape(-1, 4)[order].astype(np.float32),
        labels=np.array(objects.labels, np.int16)[order],
        annotation_ids=np.array(objects.ids, np.int64)[order],
        segmentations=None if boxes_only else objects.segmentations.packed(order),
        num_stuff_ids=_num_stuff_ids(content.get("stuff")),
        left_out=tuple(objects.left_out.most_common()),
    )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What is read has no cycles; looking for some, again and again, would take a fifth of the time."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


class _Objects:
    """Takes annotations, checks them, and keeps what the usable ones say; in arrays, since there may be a million."""

    def __init__(
        self,
        image_ids: list[int],
        sizes: list[tuple[int, int]],
        category_ids: list[int],
        path: Path,
        boxes_only: bool,
    ) -> None:
        self.ids, self.rows, self.labels, self.boxes = array("q"), array("q"), array("q"), array("d")
        self.places = array("q")  # in the file
        self.segmentations = SegmentationPacker()
        self.annotated = np.zeros(len(image_ids), bool)
        self.left_out: Counter[str] = Counter()
        self._sizes, self._path, self._boxes_only = np.array(sizes), path, boxes_only
        self._row_of = {image_id: row for row, image_id in enumerate(image_ids)}
        self._label_of = {category: label for label, category in enumerate(category_ids)}
        self._seen: set[int] = set()
        self._read = 0

    def add(self, annotations: list) -> None:
        """Raises DataError for one that cannot be right."""
        columns = take_columns(annotations, self._row_of, self._label_of, self._sizes, self._seen, self._boxes_only)
        others = range(len(annotations))
        if columns is not None:
            self._add_columns(columns, annotations)
            others = np.flatnonzero(~columns.plain).tolist()
        for number in others:
            try:
                self._add(annotations[number], self._read + number)
            except MalformedAnnotation as error:
                raise self._malformed(annotations[number], error) from error
        self._read += len(annotations)
        if not self._boxes_only and self.segmentations.pack_block():
            self._refuse_polygons(annotations)

    def _add_columns(self, columns: Columns, annotations: list) -> None:
        if not self._boxes_only:
            try:
                self.segmentations.add_polygons(columns.segmentations)
            except (TypeError, OverflowError):
                self._refuse_polygons(annotations)
                raise
        places = self._read + np.flatnonzero(columns.plain)
        self._seen.update(columns.ids.tolist())
        self.annotated[columns.rows] = True
        kept = (self.ids, columns.ids), (self.rows, columns.rows), (self.labels, columns.labels), (self.places, places)
        for values, column in (*kept, (self.boxes, columns.boxes)):
            values.frombytes(column.tobytes())

    def _add(self, annotation: dict, place: int) -> None:
        """One that is not among the columns. Raises MalformedAnnotation, too."""
        try:
            identity, row = annotation["id"], self._row_of[annotation["image_id"]]
            label = self._label_of[annotation["category_id"]]
            kinds = {type(identity), type(annotation["image_id"]), type(annotation["category_id"])}
            good = kinds == {int} and "bbox" in annotation and identity not in self._seen and abs(identity) < 2**63
        except (KeyError, TypeError):
            good = False
        if not good:
            self._refuse(annotation)
        self._seen.add(identity)
        self.annotated[row] = True
        usable = _usable(annotation, *self._sizes[row].tolist(), self._boxes_only)
        if isinstance(usable, str):
            self.left_out[usable] += 1
            return
        box, segmentation = usable
        if not self._boxes_only:
            try:
                self.segmentations.add(segmentation)
            except (TypeError, OverflowError):
                usable_polygons(segmentation)  # says what is wrong with it
                raise
        self.ids.append(identity)
        self.rows.append(row)
        self.labels.append(label)
        self.places.append(place)
        self.boxes.extend(box)

    def _refuse_polygons(self, annotations: list) -> None:
        """Of annotations of which one has polygons that are no numbers, or too large ones: says which."""
        for annotation in annotations:
            try:
                if isinstance(annotation.get("segmentation"), list):
                    usable_polygons(annotation["segmentation"])
            except MalformedAnnotation as error:
                raise self._malformed(annotation, error) from error

    def _malformed(self, annotation: dict, error: MalformedAnnotation) -> DataError:
        where = f"{self._path}, annotation {annotation['id']}"
        return DataError("an annotation is malformed", where=where, why=str(error), fix=_fix("segmentation"))

    def _refuse(self, annotation: object) -> None:
        """Of an annotation without an id of its own, or an image and a category that the file lists: says which."""
        missing = missing_keys(annotation, "annotations")
        if missing:
            raise _not_coco(f"entry {len(self._seen)} of 'annotations' lacks {missing}", self._path)
        image_id, category = annotation["image_id"], annotation["category_id"]
        if type(image_id) is not int or image_id not in self._row_of:
            where = f"{self._path}, annotation {annotation['id']}"
            why = f"it names image {image_id!r}, the file lists {len(self._row_of)} images without that id"
            raise DataError("an annotation names an unknown image", where=where, why=why, fix=_fix("image_id"))
        if type(category) is not int or category not in self._label_of:
            where = f"{self._path}, annotation {annotation['id']}"
            why = f"it names category {category!r}, the file lists {_shorten(list(self._label_of))}"
            raise DataError("an annotation names an unknown category", where=where, why=why, fix=_fix("category_id"))
        check_id(annotation["id"], self._seen, "annotations", self._path)


def _num_stuff_ids(stuff: object) -> int | None:
    """From the list of stuff classes that a file of the generated data set has; COCO's own files have none."""
    entries = stuff if isinstance(stuff, list) else []
    ids = [entry.get("id") for entry in entries if isinstance(entry, dict)]
    return max((identity + 1 for identity in ids if type(identity) is int), default=None)


def _not_coco(why: str, path: Path) -> DataError:
    return DataError("the annotation file is not COCO", where=path, why=why, fix=EXPORT)


def missing_keys(entry: object, section: str) -> str:
    """The keys that an entry lacks, as text; empty if it has all."""
    if isinstance(entry, dict) and entry.keys() >= REQUIRED[section]:
        return ""
    return ", ".join(repr(key) for key in REQUIRED[section] if not isinstance(entry, dict) or key not in entry)


def _check_keys(content: object, path: Path) -> None:
    """Of a content without its annotations."""
    if not isinstance(content, dict):
        raise _not_coco(f"the top of the file must be an object {{...}}, got a {type(content).__name__}", path)
    for section in ("images", "categories"):
        entries = content.get(section)
        if not isinstance(entries, list):
            raise _not_coco(f'it has no list "{section}"; its keys are {_shorten(sorted(content))}', path)
        for index, entry in enumerate(entries):
            missing = missing_keys(entry, section)
            if missing:
                raise _not_coco(f"entry {index} of {section!r} lacks {missing}", path)
    if not content["categories"] or not content["images"]:
        raise DataError(
            "the annotation file is empty", where=path, why="it lists no images or no categories", fix=EXPORT
        )


def _by_id(entries: list[dict], section: str, path: Path) -> dict[int, dict]:
    by_id: dict[int, dict] = {}
    for entry in entries:
        check_id(entry["id"], by_id, section, path)
        by_id[entry["id"]] = entry
    return by_id


def check_id(identity: object, seen: Container[int], section: str, path: Path) -> None:
    """Raises DataError for what is no id, or one of `seen`."""
    if type(identity) is not int or not -(2**63) < identity < 2**63:
        raise DataError("an id is not a whole number", where=path, why=f"{section}: got {identity!r}", fix=_fix("id"))
    if identity in seen:
        raise DataError("an id is used twice", where=path, why=f"{section}: id {identity}", fix=_fix("id"))


def annotated_size(image: dict, path: Path) -> tuple[int, int]:
    """(height, width) of an image's entry. Raises DataError."""
    height, width = image["height"], image["width"]
    whole = type(height) is type(width) is int
    if (
        not whole
        or not 1 <= min(height, width) <= max(height, width) <= LARGEST_COORDINATE
        or (height * width > MAX_PIXELS)
    ):
        why = f"height and width must be whole numbers from 1 to 100000, at most {MAX_PIXELS:,} pixels, "
        why += f"got {height!r} and {width!r}"
        raise DataError(
            "an image has no usable size", where=f"{path}, image {image['id']}", why=why, fix=_fix("height")
        )
    return height, width


def name_from_url(image: dict) -> str | None:
    """LVIS gives no name but "coco_url": "http://images.cocodataset.org/val2017/1.jpg", which is val2017/1.jpg."""
    url = image.get("coco_url")
    return "/".join(url.split("/")[-2:]) if isinstance(url, str) else None


def _file_name(image: dict, path: Path) -> str:
    name = image.get("file_name")
    if name is None:
        name = name_from_url(image)
    if not is_file_name(name) or not is_inside(name):
        why = f"file_name must be a path inside the image folder, at most {LONGEST_NAME} characters, got {name!r:.200}"
        raise DataError(
            "an image lies outside its folder", where=f"{path}, image {image['id']}", why=why, fix=_fix("file_name")
        )
    return name


def is_inside(name: str) -> bool:
    """Whether a name stays in its folder. Links are followed when it is opened (`path_inside`)."""
    return not name.startswith("/") and ".." not in name.split("/")


def is_file_name(name: object) -> bool:
    """Whether an image's file can be called this: neither a zero byte nor half of a surrogate pair is in any name."""
    return isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and not re.search("[\0\ud800-\udfff]", name)


def _usable(
    annotation: dict, height: int, width: int, boxes_only: bool
) -> tuple[Sequence[float], list[list[float]] | bytes] | str:
    """(box as corners, checked segmentation) of an annotation; of one to leave out, the reason."""
    box, area = annotation["bbox"], annotation.get("area")
    if not isinstance(box, list) or len(box) != 4 or not are_numbers(box) or beyond(box, LARGEST_COORDINATE):
        raise MalformedAnnotation(f"bbox must be four numbers [x, y, width, height], got {box!r}")
    if area is not None and type(area) not in (int, float):
        raise MalformedAnnotation(f"area must be a number, got {area!r}")
    reason = reason_to_leave_out(annotation, height, width)
    segmentation = annotation.get("segmentation")
    checked: list[list[float]] | bytes = []
    if isinstance(segmentation, list):
        check_drawable(height, width)
    if isinstance(segmentation, dict):  # also of one that is left out: the evaluation gives it to pycocotools
        checked = checked_run_lengths(segmentation, height, width)
    elif isinstance(segmentation, list) and (reason or not are_long_enough(segmentation)):
        checked = usable_polygons(segmentation)
    elif isinstance(segmentation, list):
        checked = segmentation  # its numbers are checked where they are packed, which is faster
    if reason:
        return reason
    if not isinstance(segmentation, dict | list) and not boxes_only:
        raise MalformedAnnotation("it has no segmentation; boxes alone cannot train a mask head")
    x, y, w, h = box
    return ((x, y, x + w, y + h), checked) if checked or boxes_only else "no polygon of 3 points or more"


def reason_to_leave_out(annotation: Mapping, height: int, width: int) -> str | None:
    """Why an annotation, whose box and area are numbers, is not trained on, whatever its mask; None if it is."""
    x, y, w, h = annotation["bbox"]
    if annotation.get("iscrowd"):
        return "a crowd"
    if annotation.get("ignore"):
        return "a difficult object" if annotation.get("difficult") else 'marked "ignore"'
    if w < 1 or h < 1:
        return "a box under 1 pixel"
    if x + w <= 0 or y + h <= 0 or x >= width or y >= height:
        return "a box outside its image"
    area = annotation.get("area")
    return "no area" if area is not None and area <= 0 else None


def _fix(key: str) -> str:
    return f'correct "{key}" there, or take the entry out'


def _shorten(values: list) -> str:
    shown = ", ".join(map(str, values[:10]))
    return shown + (f" ... ({len(values)} in all)" if len(values) > 10 else "")
