"""Which class is taken for which, and how well each image came out, at the score that pictures are drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .overlaps import CROWD, ImageOverlaps, surer_than, taken_by_class, taken_objects

SCORE, IOU = 0.3, 0.5
"""Detections from this score on, which take objects from this IoU on."""


def confusion(images: Sequence[ImageOverlaps], num_classes: int) -> np.ndarray:
    """Counts, int64 [C + 1, C + 1]: a row for each class of objects, a column for each class of detections.

    The surest detection comes first and takes the object that it overlaps most, whatever its class. The last row
    counts detections where nothing is, the last column objects that nothing has taken. Crowds are left out.
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for whole in images:
        image = surer_than(whole, SCORE)
        takes = taken_objects(image.iou, image.crowd, IOU)
        on_object = takes >= 0
        missed = ~image.crowd
        missed[takes[on_object]] = False
        np.add.at(counts, (image.truth_labels[takes[on_object]], image.labels[on_object]), 1)
        np.add.at(counts, (num_classes, image.labels[~on_object & (takes != CROWD)]), 1)
        np.add.at(counts, (image.truth_labels[missed], num_classes), 1)
    return counts


class ImageQuality(NamedTuple):
    """How well one image came out."""

    image_id: int
    quality: float
    """Sum of the IoUs of the objects found, with their class, over found + (missed + wrong) / 2, in 0..1: panoptic
    quality (Kirillov et al., CVPR 2019) of one image, with all classes together"""
    found: int
    objects: int
    wrong: int
    """detections that take no object of their class"""


def image_qualities(images: Sequence[ImageOverlaps]) -> list[ImageQuality]:
    """Of every image in which there is an object or a detection; the worst first."""
    result = []
    for whole in images:
        image = surer_than(whole, SCORE)
        takes = taken_by_class(image, IOU)
        rows = np.flatnonzero(takes >= 0)
        found, objects = len(rows), int((~image.crowd).sum())
        wrong = int((takes != CROWD).sum()) - found
        weight = found + (objects - found + wrong) / 2
        if weight:
            quality = float(image.iou[rows, takes[rows]].sum()) / weight
            result.append(ImageQuality(image.image_id, quality, found, objects, wrong))
    return sorted(result, key=lambda image: (image.quality, -image.objects, image.image_id))
