"""PASCAL VOC's average precision of boxes at IoU 0.5 (its VOCevaldet.m): at 11 recalls until 2009, then the area."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

IOU_THRESHOLD = 0.5


@dataclass(frozen=True)
class VocPrecision:
    """AP in 0..1 at IoU 0.5; NaN where there is nothing to find."""

    mean: float
    """over the classes"""
    per_class: dict[str, float]


def voc_average_precision(
    ground_truth: Mapping,
    entries: Sequence[Mapping],
    eleven_points: bool,
    inclusive: bool = False,
    image_ids: Sequence[int] | None = None,
) -> VocPrecision:
    """VOC's average precision.

    Each detection, the surest of its class first, takes the object of its class and image that it overlaps most. From
    IoU 0.5 on it is right if it is the first to take the object, and wrong otherwise; on an object marked "ignore"
    (VOC: difficult) it does not count.

    Args:
        ground_truth: a COCO annotation file's content.
        entries: COCO results with boxes (x, y, width, height); of images that are not scored they are left out.
        eleven_points: AP is the mean of the precisions at recall 0, 0.1 ... 1; else the area under the curve. Both of
            the precision made monotonous.
        inclusive: boxes name their first and last pixel, so that a side is one pixel longer than their difference.
        image_ids: score these images only; all by default.
    """
    chosen = {image["id"] for image in ground_truth["images"]} if image_ids is None else set(image_ids)
    truth: dict[int, dict[int, list[Mapping]]] = {entry["id"]: {} for entry in ground_truth["categories"]}
    found: dict[int, list[Mapping]] = {category: [] for category in truth}
    for annotation in ground_truth["annotations"]:
        if annotation["image_id"] in chosen:
            truth[annotation["category_id"]].setdefault(annotation["image_id"], []).append(annotation)
    for entry in entries:
        if entry["image_id"] in chosen:
            found[entry["category_id"]].append(entry)
    per_class = {
        entry["name"]: _class_precision(truth[entry["id"]], found[entry["id"]], eleven_points, float(inclusive))
        for entry in ground_truth["categories"]
    }
    defined = [value for value in per_class.values() if not math.isnan(value)]
    return VocPrecision(sum(defined) / len(defined) if defined else math.nan, per_class)


def _class_precision(
    truth: Mapping[int, Sequence[Mapping]], found: Sequence[Mapping], eleven_points: bool, pixel: float
) -> float:
    """AP of one class; `truth` by image."""
    boxes = {image: np.array([a["bbox"] for a in objects], np.float64) for image, objects in truth.items()}
    ignored = {image: [bool(a.get("ignore") or a.get("iscrowd")) for a in objects] for image, objects in truth.items()}
    taken = {image: [False] * len(objects) for image, objects in truth.items()}
    num_objects = sum(flags.count(False) for flags in ignored.values())
    if num_objects == 0:
        return math.nan
    right = []  # of each detection that counts, the surest first
    for entry in sorted(found, key=lambda entry: -entry["score"]):
        image, best, which = entry["image_id"], 0.0, 0
        if image in boxes:
            overlaps = _iou(np.array(entry["bbox"], np.float64), boxes[image], pixel)
            which = int(overlaps.argmax())
            best = overlaps[which]
        if best < IOU_THRESHOLD:
            right.append(False)
        elif not ignored[image][which]:
            right.append(not taken[image][which])
            taken[image][which] = True
    hits = np.cumsum(right)
    recall, precision = hits / num_objects, hits / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the highest precision at this recall or a higher one
    if eleven_points:
        at = np.searchsorted(
            recall, np.linspace(0, 1, 11) - 1e-12
        )  # 3 of 10 found is recall 0.3, whatever its last bit
        return float(np.append(envelope, 0.0)[at].mean())
    return float((np.diff(recall, prepend=0.0) * envelope).sum())


def _iou(box: np.ndarray, others: np.ndarray, pixel: float) -> np.ndarray:
    """IoU [n] of a box [4] with n others [n, 4], (x, y, width, height)."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    inside = np.clip(high - low + pixel, 0, None).prod(1)
    return inside / ((box[2:] + pixel).prod() + (others[:, 2:] + pixel).prod(1) - inside).clip(1e-12)
