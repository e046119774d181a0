"""What kinds of error a detector makes, and what each costs.

The definitions are TIDE's: Bolya, Foley, Hays and Hoffman, "TIDE: A General Toolbox for Identifying Object Detection
Errors", ECCV 2020, sections 2.2 and 2.3.

A detection is wrong if it takes no object of its class at IoU 0.5. What it then overlaps says what went wrong; the
paper leaves open which comes first where several hold, here it is the order of this list:

    duplicate      IoU of 0.5 or more with an object of its class, which a surer detection has taken
    localisation   IoU from 0.1 to 0.5 with an object of its class
    class          IoU of 0.5 or more with an object of another class
    both           IoU from 0.1 to 0.5 with an object of another class
    background     less than 0.1 with everything
    missed         an object that nothing has taken, and that no error of class or localisation lies on

What a kind costs is how much AP at IoU 0.5 rises when an oracle mends all errors of that kind alone: it moves the
detection onto the object (localisation) or gives it the object's class (class), and of all that then take one object
keeps the surest; takes the detection away (duplicate, both, background); or takes the objects away (missed). The costs
do not add up to 1 - AP, since mending one kind changes what another costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .overlaps import CROWD, NOBODY, ImageOverlaps, taken_by_class

FOREGROUND, BACKGROUND = 0.5, 0.1
"""IoU from which on a detection lies on an object, and below which on nothing: the paper's t_f and t_b."""

KINDS = {
    "localisation": "the right class, and a box or mask that overlaps the object too little (IoU 0.1 to 0.5)",
    "class": "lies on an object (IoU 0.5 or more) and calls it something else",
    "both": "overlaps an object of another class a little (IoU 0.1 to 0.5)",
    "duplicate": "a second detection of an object that a surer one has found",
    "background": "there is nothing (IoU below 0.1)",
    "missed": "an object that nothing was found on, not even with the wrong class or a bad outline",
}


@dataclass(frozen=True)
class ErrorKinds:
    """Costs are of AP in 0..1."""

    ap50: float
    """AP at IoU 0.5 over the classes, as COCO computes it; NaN where there is no object"""
    counts: dict[str, int]
    """kind -> detections (missed: objects)"""
    costs: dict[str, float]
    """kind -> by how much AP at IoU 0.5 would be higher; NaN where there is no object, or none that is not missed"""


@dataclass
class _Detections:
    """Of all images, in the order in which they are found in them."""

    scores: np.ndarray  # float64 [D]
    labels: np.ndarray  # int64 [D]
    objects: np.ndarray  # int64 [D]: the object taken (a number over all images), NOBODY or CROWD
    kinds: np.ndarray  # text [D]; "" for one that is right or in a crowd
    targets: np.ndarray  # int64 [D]: the object that an error of class or localisation lies on; else NOBODY


def error_kinds(images: Sequence[ImageOverlaps], num_classes: int) -> ErrorKinds:
    """The errors of a detector in `images`, and what each kind of them costs."""
    found = _all_detections(images)
    truth_labels = np.concatenate([np.zeros(0, np.int64), *(image.truth_labels for image in images)])
    counted = ~np.concatenate([np.zeros(0, bool), *(image.crowd for image in images)])
    covered = np.zeros(len(counted), bool)
    covered[found.objects[found.objects >= 0]] = True
    covered[found.targets[found.targets >= 0]] = True
    missed = counted & ~covered
    num_objects = np.bincount(truth_labels[counted], minlength=num_classes)
    num_missed = np.bincount(truth_labels[missed], minlength=num_classes)

    everything = found.objects != CROWD
    right = found.objects >= 0
    ap50 = _mean_precision(found.scores, found.labels, right, everything, num_objects)
    counts, costs = {}, {}
    for kind in KINDS:
        of_kind = found.kinds == kind
        if kind == "missed":
            mended = _mean_precision(found.scores, found.labels, right, everything, num_objects - num_missed)
        elif kind in ("class", "localisation"):
            mended = _mean_precision(*_mended(found, of_kind, truth_labels, everything), num_objects)
        else:
            mended = _mean_precision(found.scores, found.labels, right, everything & ~of_kind, num_objects)
        counts[kind] = int(missed.sum() if kind == "missed" else of_kind.sum())
        costs[kind] = mended - ap50
    return ErrorKinds(ap50, counts, costs)


def _all_detections(images: Sequence[ImageOverlaps]) -> _Detections:
    parts, first = [], 0
    for image in images:
        takes = taken_by_class(image, FOREGROUND)
        kinds, targets = _kinds(image, takes)
        parts.append(
            (
                image.scores,
                image.labels,
                np.where(takes >= 0, takes + first, takes),
                kinds,
                np.where(targets >= 0, targets + first, targets),
            )
        )
        first += len(image.truth_labels)
    empty = (np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, "U12"), np.zeros(0, np.int64))
    return _Detections(*(np.concatenate(column) for column in zip(empty, *parts, strict=True)))


def _kinds(image: ImageOverlaps, takes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(kind of error of each detection, the object that it lies on)."""
    kinds, targets = np.full(len(takes), "", "U12"), np.full(len(takes), NOBODY, np.int64)
    for detection in np.flatnonzero(takes == NOBODY):
        iou = np.where(image.crowd, 0.0, image.iou[detection])
        same = image.truth_labels == image.labels[detection]
        own, other = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
        best_own, best_other = own.max(initial=0.0), other.max(initial=0.0)
        if best_own >= FOREGROUND:
            kinds[detection] = "duplicate"
        elif best_own >= BACKGROUND:
            kinds[detection], targets[detection] = "localisation", own.argmax()
        elif best_other >= FOREGROUND:
            kinds[detection], targets[detection] = "class", other.argmax()
        else:
            kinds[detection] = "both" if best_other >= BACKGROUND else "background"
    return kinds, targets


def _mended(found: _Detections, of_kind: np.ndarray, truth_labels: np.ndarray, everything: np.ndarray) -> tuple:
    """(scores, labels, right, kept) when the detections of a kind take the objects that they lie on."""
    takes = np.where(of_kind, found.targets, found.objects)
    labels = found.labels.copy()
    labels[of_kind] = truth_labels[takes[of_kind]]
    right, kept = takes >= 0, everything.copy()
    claims = np.flatnonzero(right)
    claims = claims[np.lexsort((of_kind[claims], -found.scores[claims], takes[claims]))]  # by object, the surest first
    later = np.flatnonzero(np.diff(takes[claims], prepend=NOBODY) == 0)
    kept[claims[later]] = False
    return found.scores, labels, right, kept


def _mean_precision(
    scores: np.ndarray, labels: np.ndarray, right: np.ndarray, kept: np.ndarray, num_objects: np.ndarray
) -> float:
    """Mean over the classes that have objects; NaN if none has."""
    precisions = []
    for label in np.flatnonzero(num_objects > 0):
        chosen = kept & (labels == label)
        precisions.append(_precision(scores[chosen], right[chosen], num_objects[label]))
    return float(np.mean(precisions)) if precisions else math.nan


def _precision(scores: np.ndarray, right: np.ndarray, num_objects: int) -> float:
    """COCO's AP of one class: the mean over recalls 0, 0.01 ... 1 of the best precision at that recall or a higher."""
    hits = np.cumsum(right[np.argsort(-scores, kind="stable")])
    recall, precision = hits / num_objects, hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.append(envelope, 0.0)[np.searchsorted(recall, np.linspace(0, 1, 101))].mean())
