"""COCO annotation files: read, checked, cleaned, and packed into arrays.

Python objects are not kept: a forked worker that only reads them would still write their reference counts, and so
copy all of their memory; arrays stay shared.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ..errors import DataError
from ..images import MAX_PIXELS
from .segmentation import (
    LARGEST_COORDINATE,
    MalformedAnnotation,
    PackedSegmentations,
    checked_run_lengths,
    pack_segmentations,
    usable_polygons,
)

REQUIRED = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


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
    return pack_annotations(read_content(path), path, boxes_only)


def pack_annotations(content: dict, path: Path, boxes_only: bool = False) -> Annotations:
    """The usable objects of an annotation file's content; `path` is what messages call it. As read_annotations."""
    _check_keys(content, path)
    categories = _by_id(content["categories"], "categories", path)
    category_ids = sorted(categories)
    label_of = {category: label for label, category in enumerate(category_ids)}
    images = _by_id(content["images"], "images", path)
    sizes = {image_id: _image_size(image, path) for image_id, image in images.items()}
    _by_id(content["annotations"], "annotations", path)

    annotated = set()
    left_out: Counter[str] = Counter()
    objects: dict[int, list[tuple]] = {image_id: [] for image_id in images}
    for annotation in content["annotations"]:
        image_id, category = annotation["image_id"], annotation["category_id"]
        where = f"{path}, annotation {annotation['id']}"
        if type(image_id) is not int or image_id not in images:
            why = f"it names image {image_id!r}, the file lists {len(images)} images without that id"
            raise DataError("an annotation names an unknown image", where=where, why=why, fix=_fix("image_id"))
        if type(category) is not int or category not in label_of:
            why = f"it names category {category!r}, the file lists {_shorten(category_ids)}"
            raise DataError("an annotation names an unknown category", where=where, why=why, fix=_fix("category_id"))
        annotated.add(image_id)
        try:
            usable = _usable(annotation, *sizes[image_id], boxes_only)
        except MalformedAnnotation as error:
            raise DataError(
                "an annotation is malformed", where=where, why=str(error), fix=_fix("segmentation")
            ) from error
        if isinstance(usable, str):
            left_out[usable] += 1
        else:
            box, segmentation = usable
            objects[image_id].append((box, label_of[category], annotation["id"], segmentation))

    rows = [row for image_id in images for row in objects[image_id]]
    return Annotations(
        class_names=tuple(str(categories[category]["name"]) for category in category_ids),
        category_ids=np.array(category_ids, np.int64),
        image_ids=np.array(list(images), np.int64),
        file_names=np.array([_file_name(image, path).encode() for image in images.values()], dtype=np.bytes_),
        sizes=np.array([sizes[image_id] for image_id in images], np.int32).reshape(-1, 2),
        annotated=np.array([image_id in annotated for image_id in images], bool),
        object_offsets=np.cumsum([0] + [len(objects[image_id]) for image_id in images]),
        boxes=np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        labels=np.array([row[1] for row in rows], np.int16),
        annotation_ids=np.array([row[2] for row in rows], np.int64),
        segmentations=None if boxes_only else pack_segmentations([row[3] for row in rows]),
        num_stuff_ids=_num_stuff_ids(content.get("stuff")),
        left_out=tuple(left_out.most_common()),
    )


def _num_stuff_ids(stuff: object) -> int | None:
    """From the list of stuff classes that a file of the generated data set has; COCO's own files have none."""
    entries = stuff if isinstance(stuff, list) else []
    ids = [entry.get("id") for entry in entries if isinstance(entry, dict)]
    return max((identity + 1 for identity in ids if type(identity) is int), default=None)


def read_content(path: Path) -> dict:
    """The JSON of an annotation file. Raises DataError: it cannot be read, or is no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"it contains {name}, which is no number")

    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file, parse_constant=refuse)
    except OSError as error:
        fix = "name the annotation file, or the folder that has annotations/"
        raise DataError(
            "the annotation file cannot be read", where=path, why=error.strerror or str(error), fix=fix
        ) from error
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise DataError(
            "the annotation file is not JSON", where=where, why=error.msg, fix=f"python -m json.tool '{path}'"
        ) from error
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise DataError(
            "the annotation file is not usable JSON", where=path, why=str(error), fix=f"file '{path}'"
        ) from error


def _check_keys(content: object, path: Path) -> None:
    fix = "export the data set as COCO instances (images, annotations, categories)"
    if not isinstance(content, dict):
        why = f"the top of the file must be an object {{...}}, got a {type(content).__name__}"
        raise DataError("the annotation file is not COCO", where=path, why=why, fix=fix)
    for section, keys in REQUIRED.items():
        entries = content.get(section)
        if not isinstance(entries, list):
            why = f'it has no list "{section}"; its keys are {_shorten(sorted(content))}'
            raise DataError("the annotation file is not COCO", where=path, why=why, fix=fix)
        for index, entry in enumerate(entries):
            missing = [key for key in keys if key not in entry] if isinstance(entry, dict) else list(keys)
            if missing:
                why = f"entry {index} of {section!r} lacks {', '.join(map(repr, missing))}"
                raise DataError("the annotation file is not COCO", where=path, why=why, fix=fix)
    if not content["categories"] or not content["images"]:
        raise DataError("the annotation file is empty", where=path, why="it lists no images or no categories", fix=fix)


def _by_id(entries: list[dict], section: str, path: Path) -> dict[int, dict]:
    by_id: dict[int, dict] = {}
    for entry in entries:
        if type(entry["id"]) is not int or abs(entry["id"]) >= 2**63:
            raise DataError(
                "an id is not a whole number", where=path, why=f"{section}: got {entry['id']!r}", fix=_fix("id")
            )
        if entry["id"] in by_id:
            raise DataError("an id is used twice", where=path, why=f"{section}: id {entry['id']}", fix=_fix("id"))
        by_id[entry["id"]] = entry
    return by_id


def _image_size(image: dict, path: Path) -> tuple[int, int]:
    height, width = image["height"], image["width"]
    sides_are_whole = all(type(side) is int and 1 <= side <= LARGEST_COORDINATE for side in (height, width))
    if not sides_are_whole or height * width > MAX_PIXELS:
        why = f"height and width must be whole numbers from 1 to 100000, at most {MAX_PIXELS:,} pixels, "
        why += f"got {height!r} and {width!r}"
        raise DataError(
            "an image has no usable size", where=f"{path}, image {image['id']}", why=why, fix=_fix("height")
        )
    return height, width


def _file_name(image: dict, path: Path) -> str:
    name = image.get("file_name")
    if name is None and isinstance(image.get("coco_url"), str):  # LVIS: http://images.cocodataset.org/val2017/1.jpg
        name = "/".join(image["coco_url"].split("/")[-2:])
    if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        why = f"file_name must be a path inside the image folder, got {name!r}"
        raise DataError(
            "an image lies outside its folder", where=f"{path}, image {image['id']}", why=why, fix=_fix("file_name")
        )
    return name


def _usable(
    annotation: dict, height: int, width: int, boxes_only: bool
) -> tuple[Sequence[float], list[list[float]] | bytes] | str:
    """(box as corners, checked segmentation) of an annotation; of one to leave out, the reason."""
    box, area = annotation["bbox"], annotation.get("area")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_coordinate, box)):
        raise MalformedAnnotation(f"bbox must be four numbers [x, y, width, height], got {box!r}")
    if area is not None and type(area) not in (int, float):
        raise MalformedAnnotation(f"area must be a number, got {area!r}")
    segmentation = annotation.get("segmentation")
    checked: list[list[float]] | bytes = []
    if isinstance(segmentation, dict):  # also of one that is left out: the evaluation gives it to pycocotools
        checked = checked_run_lengths(segmentation, height, width)
    elif isinstance(segmentation, list):
        checked = usable_polygons(segmentation)
    x, y, w, h = box
    if annotation.get("iscrowd"):
        return "a crowd"
    if annotation.get("ignore"):
        return "a difficult object" if annotation.get("difficult") else 'marked "ignore"'
    if w < 1 or h < 1:
        return "a box under 1 pixel"
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        return "a box outside its image"
    if area is not None and area <= 0:
        return "no area"
    if not isinstance(segmentation, dict | list) and not boxes_only:
        raise MalformedAnnotation("it has no segmentation; boxes alone cannot train a mask head")
    return ((x, y, x + w, y + h), checked) if checked or boxes_only else "no polygon of 3 points or more"


def _is_coordinate(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST_COORDINATE


def _fix(key: str) -> str:
    return f'correct "{key}" there, or take the entry out'


def _shorten(values: list) -> str:
    shown = ", ".join(map(str, values[:10]))
    return shown + (f" ... ({len(values)} in all)" if len(values) > 10 else "")
