"""What was found in each image beside what is there: the IoU of every detection with every object, and who takes whom.

The questions of a report (kinds of error, confusion of classes, best and worst images) start from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as mask_api

from .coco_evaluation import bytes_rle, scored_objects, truth_rle

NOBODY, CROWD = -1, -2
"""In place of an object: the detection is wrong; or it lies in a crowd, and does not count."""

MOST_DETECTIONS = 100
"""Of each class and image, as COCO scores them."""


class ImageOverlaps(NamedTuple):
    """D detections, the surest first, and G objects of one image."""

    image_id: int
    scores: np.ndarray  # float64 [D]
    labels: np.ndarray  # int64 [D]: places in the ground truth's categories
    truth_labels: np.ndarray  # int64 [G]
    crowd: np.ndarray  # bool [G]
    iou: np.ndarray  # float64 [D, G]; with a crowd: the share of the detection that lies in it, as COCO has it


def image_overlaps(
    ground_truth: Mapping, entries: Sequence[Mapping], kind: str, image_ids: Sequence[int]
) -> list[ImageOverlaps]:
    """The tables of all images, by ascending id.

    Args:
        ground_truth: a COCO annotation file's content.
        entries: COCO results of one kind; those of other images are left out.
        kind: "bbox" or "segm".
    """
    place = {category["id"]: i for i, category in enumerate(ground_truth["categories"])}
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    truths: dict[int, list[Mapping]] = {image_id: [] for image_id in sorted(set(image_ids))}
    found: dict[int, list[Mapping]] = {image_id: [] for image_id in truths}
    for annotation in scored_objects(ground_truth, truths, kind):
        truths[annotation["image_id"]].append(annotation)
    for entry in entries:
        if entry["image_id"] in found:
            found[entry["image_id"]].append(entry)
    tables = []
    for image_id, objects in truths.items():
        detections = _scored(found[image_id])
        crowd = np.array([bool(truth.get("iscrowd", 0)) for truth in objects], bool)
        tables.append(
            ImageOverlaps(
                image_id,
                np.array([entry["score"] for entry in detections], np.float64),
                np.array([place[entry["category_id"]] for entry in detections], np.int64),
                np.array([place[truth["category_id"]] for truth in objects], np.int64),
                crowd,
                _iou(detections, objects, crowd, kind, sizes[image_id]),
            )
        )
    return tables


def taken_objects(iou: np.ndarray, crowd: np.ndarray, threshold: float) -> np.ndarray:
    """Which object each detection takes, as COCO decides it: int64 [D], an index, NOBODY or CROWD.

    The surest detection comes first and takes the free object that it overlaps most, from `threshold` on. One that is
    left without may lie in a crowd, which takes any number.

    Args:
        iou: [D, G], the surest detection first; of one class, or of all if classes are not to matter.
        crowd: bool [G].
    """
    takes = np.full(len(iou), NOBODY, np.int64)
    if not iou.size:
        return takes
    free = np.where(crowd, -1.0, iou)
    in_crowd = np.where(crowd, iou, -1.0).max(1) >= threshold
    for detection, row in enumerate(free):
        best = len(row) - 1 - int(row[::-1].argmax())  # of equals the last, as COCO's loop leaves it
        if row[best] >= threshold:
            takes[detection] = best
            free[:, best] = -1.0
        elif in_crowd[detection]:
            takes[detection] = CROWD
    return takes


def taken_by_class(image: ImageOverlaps, threshold: float) -> np.ndarray:
    """As `taken_objects`, where a detection can only take objects of its own class."""
    takes = np.full(len(image.labels), NOBODY, np.int64)
    for label in np.unique(image.labels):
        rows, columns = np.flatnonzero(image.labels == label), np.flatnonzero(image.truth_labels == label)
        taken = taken_objects(image.iou[np.ix_(rows, columns)], image.crowd[columns], threshold)
        on_object = taken >= 0
        taken[on_object] = columns[taken[on_object]]
        takes[rows] = taken
    return takes


def surer_than(image: ImageOverlaps, score: float) -> ImageOverlaps:
    """Without the detections below `score`."""
    count = int((image.scores >= score).sum())
    return image._replace(scores=image.scores[:count], labels=image.labels[:count], iou=image.iou[:count])


def _scored(entries: list[Mapping]) -> list[Mapping]:
    """The surest first, without those of a class that are beyond COCO's limit."""
    kept, counts = [], {}
    for entry in sorted(entries, key=lambda entry: -entry["score"]):
        counts[entry["category_id"]] = counts.get(entry["category_id"], 0) + 1
        if counts[entry["category_id"]] <= MOST_DETECTIONS:
            kept.append(entry)
    return kept


def _iou(detections: list, objects: list, crowd: np.ndarray, kind: str, size: tuple[int, int]) -> np.ndarray:
    if not detections or not objects:
        return np.zeros((len(detections), len(objects)))
    if kind == "bbox":
        ours, theirs = ([one["bbox"] for one in side] for side in (detections, objects))
        return mask_api.iou(np.array(ours, np.float64), np.array(theirs, np.float64), crowd.astype(np.uint8))
    ours = [bytes_rle(entry["segmentation"]) for entry in detections]
    theirs = [truth_rle(truth["segmentation"], *size) for truth in objects]
    return mask_api.iou(ours, theirs, crowd.astype(np.uint8))
