"""One split's annotations, categories and entries of images: what is wrong with each, and how it is mended."""

from pathlib import Path

import numpy as np
from pycocotools import mask as mask_api

from ..errors import DataError
from .annotations import MOST_CLASSES, REQUIRED, annotated_size, check_id, is_file_name, missing_keys
from .crossings import crosses_itself
from .findings import Finding, Findings
from .segmentation import (
    LARGEST_COORDINATE,
    MalformedAnnotation,
    are_numbers,
    beyond,
    check_drawable,
    checked_run_lengths,
    usable_polygons,
)

TAKEN_OUT = "annotation taken out"
SMALLEST_AGREEMENT = 0.5
"""IoU of an object's box and its mask's, below which one of them is taken to be wrong."""
TOLERANCE = 1.0
"""Pixels by which a box may reach beyond its image: COCO's own are rounded."""
FIRST_NEW_ID = 2**40


class AnnotationChecker:
    """Checks annotations one after the other.

    Args:
        findings: gets what is wrong.
        split: its name.
        images: the usable images of the split, by id.
        dropped: file names of the images that are taken out, by id.
        category_ids: of the file.
        boxes_only: masks are not expected.
    """

    def __init__(
        self,
        findings: Findings,
        split: str,
        images: dict[int, dict],
        dropped: dict[int, str],
        category_ids: set[int],
        boxes_only: bool = False,
    ) -> None:
        self._findings, self._split, self._boxes_only = findings, split, boxes_only
        self._images, self._dropped, self._category_ids = images, dropped, category_ids
        self._ids: set[int] = set()
        self._seen: set[int] = set()

    def mended(self, annotation: object) -> dict | None:
        """The annotation as it is if nothing is wrong, or mended; None: it is taken out."""
        missing = [key for key in REQUIRED["annotations"] if not isinstance(annotation, dict) or key not in annotation]
        if missing:
            return self._found("annotation lacks a key", annotation, f"lacks {', '.join(missing)}", TAKEN_OUT)
        image_id, category = annotation["image_id"], annotation["category_id"]
        if type(image_id) is int and image_id in self._dropped:
            return self._found("annotation of an image taken out", annotation, self._dropped[image_id], TAKEN_OUT)
        if type(image_id) is not int or image_id not in self._images:
            return self._found("annotation of an unknown image", annotation, f"image_id {image_id!r}", TAKEN_OUT)
        if type(category) is not int or category not in self._category_ids:
            return self._found("annotation of an unknown category", annotation, f"category_id {category!r}", TAKEN_OUT)
        original, annotation = annotation, self._with_own_id(annotation)
        image = self._images[image_id]
        try:
            annotation, mask = self._with_good_mask(annotation, image)
        except MalformedAnnotation as error:
            kind = "mask of another size" if "are for size" in str(error) else "malformed mask"
            return self._found(kind, original, str(error), TAKEN_OUT)
        if annotation is None:
            return None
        annotation = self._with_good_box(annotation, image, mask)
        if annotation is None:
            return None
        area = annotation.get("area")
        if (area is not None and type(area) not in (int, float)) or (area is not None and area <= 0):
            pixels = annotation["bbox"][2] * annotation["bbox"][3] if mask is None else int(mask_api.area(mask))
            self._found("no area", annotation, f"area {area!r}", f"area set to {pixels}")
            annotation = annotation | {"area": pixels}
        key = hash((image_id, category, str(annotation["bbox"]), str(annotation.get("segmentation"))))
        if key in self._seen:
            return self._found("same annotation twice", original, "as one before it in every number", TAKEN_OUT)
        self._seen.add(key)
        return annotation

    def _with_own_id(self, annotation: dict) -> dict:
        identity = annotation["id"]
        if type(identity) is not int or abs(identity) >= 2**63 or identity in self._ids:
            new = FIRST_NEW_ID + len(self._ids)
            self._found("annotation id used twice", annotation, f"id {identity!r}", f"its id is now {new}")
            annotation = annotation | {"id": new}
        self._ids.add(annotation["id"])
        return annotation

    def _with_good_mask(self, annotation: dict, image: dict) -> tuple[dict | None, dict | None]:
        """(the annotation, its mask as COCO RLE or None where it has none). Raises MalformedAnnotation."""
        segmentation, (height, width) = annotation.get("segmentation"), (image["height"], image["width"])
        if isinstance(segmentation, dict):
            counts = checked_run_lengths(segmentation, height, width)
            mask = {"size": [height, width], "counts": counts}
        elif isinstance(segmentation, list):
            check_drawable(height, width)
            polygons = usable_polygons(segmentation)
            if len(polygons) < len(segmentation) or not polygons:
                change = "the others are kept" if polygons else TAKEN_OUT
                self._found("empty polygon", annotation, "a polygon of fewer than 3 points, or none", change)
                if not polygons:
                    return None, None
                annotation = annotation | {"segmentation": polygons}
            mask = mask_api.merge(mask_api.frPyObjects(polygons, height, width))
            if not annotation.get("iscrowd") and any(map(crosses_itself, polygons)):
                change = "replaced by run lengths of the same pixels"
                self._found("self-crossing polygon", annotation, "its outline crosses itself", change)
                annotation = annotation | {"segmentation": mask | {"counts": mask["counts"].decode()}}
        else:
            if not self._boxes_only:
                self._found("no mask", annotation, "a box alone trains Faster R-CNN only", "left as it is")
            return annotation, None
        if not mask_api.area(mask):
            self._found("mask without a pixel", annotation, "the mask is empty", TAKEN_OUT)
            return None, None
        return annotation, mask

    def _with_good_box(self, annotation: dict, image: dict, mask: dict | None) -> dict | None:
        box = annotation["bbox"]
        fault = _box_fault(box, image["height"], image["width"])
        from_mask = None if mask is None else [float(side) for side in mask_api.toBbox(mask)]
        object_mask = None if annotation.get("iscrowd") else from_mask
        if fault is None and object_mask is not None and box_iou(box, object_mask) < SMALLEST_AGREEMENT:
            fault = "box disagrees with its mask"
        if fault is None:
            return annotation
        detail = f"bbox {box!r}"[:120]
        if fault == "box reaches beyond its image":
            x, y = max(box[0], 0.0), max(box[1], 0.0)
            new = [x, y, min(box[0] + box[2], image["width"]) - x, min(box[1] + box[3], image["height"]) - y]
            if object_mask is not None and box_iou(new, object_mask) < SMALLEST_AGREEMENT:
                new = object_mask
        elif from_mask is None:
            return self._found(fault, annotation, detail, TAKEN_OUT)
        else:
            new = from_mask
            detail += f", the mask's is {new}"
        self._found(fault, annotation, detail, f"bbox set to {new}")
        return annotation | {"bbox": new}

    def _found(self, kind: str, annotation: object, detail: str, change: str) -> None:
        entry = annotation if isinstance(annotation, dict) else {}
        image = self._images.get(entry["image_id"]) if type(entry.get("image_id")) is int else None
        name = "" if image is None else image["file_name"]
        self._findings.add(Finding(kind, self._split, name, entry.get("id"), detail, change), entry)


def _box_fault(box: object, height: int, width: int) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not are_numbers(box) or beyond(box, LARGEST_COORDINATE):
        return "malformed box"
    x, y, w, h = box
    if w < 1 or h < 1:
        return "box under 1 pixel"
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        return "box outside its image"
    if x < -TOLERANCE or y < -TOLERANCE or x + w > width + TOLERANCE or y + h > height + TOLERANCE:
        return "box reaches beyond its image"
    return None


def box_iou(a: list[float], b: list[float]) -> float:
    """Of two boxes (x, y, width, height)."""
    low = np.maximum(a[:2], b[:2])
    high = np.minimum(np.add(a[:2], a[2:]), np.add(b[:2], b[2:]))
    inside = float(np.clip(high - low, 0, None).prod())
    return inside / max(a[2] * a[3] + b[2] * b[3] - inside, 1e-9)


def usable_categories(entries: list, split: str, source: Path, findings: Findings) -> list[dict]:
    """The entries that the reader takes. `findings` gets what is wrong with the others, and with none at all."""
    usable: dict[int, dict] = {}

    def found(detail: object, change: str = "category taken out") -> None:
        findings.add(Finding("category that cannot be used", split, "", None, str(detail), change))

    for entry in entries:
        identity = entry.get("id") if isinstance(entry, dict) else None
        try:
            check_id(identity, usable, "categories", source)
        except DataError as error:
            found(f"{error.what}: {error.why}")
            continue
        if len(usable) == MOST_CLASSES:
            found(f"there are more than {MOST_CLASSES:,}")
            continue
        if "name" not in entry:
            entry = entry | {"name": f"category {identity}"}
            found(f"id {identity} lacks 'name'", f"its name is now {entry['name']!r}")
        usable[identity] = entry
    return list(usable.values())


def usable_image(entry: object, source: Path) -> str | None:
    """What makes an image's entry useless to the reader; None if nothing does. `source` is the annotation file."""
    missing = missing_keys(entry, "images")
    if missing or "file_name" not in entry:
        return f"lacks {missing or 'file_name'}"
    if not is_file_name(entry["file_name"]):
        return f"its file_name is no name of a file: {entry['file_name']!r:.200}"
    try:
        check_id(entry["id"], (), "images", source)
        annotated_size(entry, source)
    except DataError as error:
        return error.why
    return None
