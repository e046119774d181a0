"""Whether two forms of a detector find the same: what both find, how far apart it is, AP, and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .arithmetic import Arithmetic
from .coco_evaluation import average_precision, has_masks, result_entries
from .data import CocoDataset
from .detections import Detections
from .inference import unpack_detections

NEAR = 1.0
"""Pixels: two detections of one class are the same object's when no side of their boxes is further apart."""

Detect = Callable[[torch.Tensor, torch.Tensor], Detections]


@dataclass
class Agreement:
    """What two results have in common, over any number of images."""

    found: list[int] = field(default_factory=lambda: [0, 0])
    """Detections of each."""
    both: int = 0
    """Detections of the first that are in the second, too: of one class, and each the other's nearest."""
    boxes: float = 0.0
    """Among these the largest difference of a coordinate, in pixels of the network's input,"""
    scores: float = 0.0
    """of a score,"""
    masks: float = 0.0
    """and of a mask probability."""

    def add(self, first: Detections, second: Detections) -> None:
        """Compares the detections of one image: batches of 1."""
        counts = int(first.count[0]), int(second.count[0])
        self.found = [total + count for total, count in zip(self.found, counts, strict=True)]
        if 0 in counts:
            return
        (a, b) = (
            [None if tensor is None else tensor[0, :count].float() for tensor in result[:4]]
            for result, count in zip((first, second), counts, strict=True)
        )
        apart = (a[0][:, None] - b[0][None]).abs().amax(-1)
        apart = apart.masked_fill(a[2][:, None] != b[2][None], torch.inf)
        nearest, back = apart.argmin(1), apart.argmin(0)
        rows = torch.arange(counts[0], device=apart.device)
        rows = rows[(back[nearest] == rows) & (apart.amin(1) <= NEAR)]
        self.both += len(rows)
        if len(rows) == 0:
            return
        for name, ours, theirs in zip(("boxes", "scores", "labels", "masks"), a, b, strict=True):
            if name != "labels" and ours is not None:
                difference = (ours[rows] - theirs[nearest[rows]]).abs().max().item()
                setattr(self, name, max(getattr(self, name), difference))


@dataclass
class Parity:
    agreement: Agreement
    milliseconds: tuple[float, float]
    """Medians: the network and its post-processing to fixed-capacity detections, one image, in turns."""
    ap: dict[str, tuple[float, float]]
    """{"bbox": (first, second), "segm": ...}, as far as there is ground truth of these classes."""


def measure_parity(
    first: Detect,
    second: Detect,
    make_input: Callable,
    dataset: CocoDataset,
    images: int,
    arithmetic: Arithmetic,
    with_ap: bool,
) -> Parity:
    """Runs both on the first `images` of a data set.

    Args:
        make_input: uint8 [H, W, 3] -> (images [1, 3, H', W'], image_sizes [1, 2]), for both.
        arithmetic: the detector's, by which its boxes go back to the picture's pixels.
        with_ap: the labels are the data set's.
    """
    agreement, seconds, ids = Agreement(), ([], []), []
    entries: tuple[dict[str, list], dict[str, list]] = ({}, {})
    with torch.inference_mode():
        for index in range(min(images, len(dataset))):
            image, image_id = dataset.image(index), dataset.image_info(index).image_id
            arguments = make_input(image)
            ids.append(image_id)
            results = []
            for side, detect in enumerate((first, second)):
                if index == 0:
                    detect(*arguments)  # warms caches
                found, duration = _timed(detect, arguments)
                seconds[side].append(duration)
                results.append(found)
                (result,) = unpack_detections(found, arguments[1], [image.shape[:2]], arithmetic)
                if with_ap:
                    arrays = [x.numpy() for x in (result.boxes, result.scores, result.labels)]
                    for kind, new in result_entries(image_id, *arrays, result.masks, dataset.category_ids).items():
                        entries[side].setdefault(kind, []).extend(new)
            agreement.add(*results)
    truth = dataset.ground_truth()
    kinds = [kind for kind in entries[0] if kind == "bbox" or has_masks(truth)]
    ap = {kind: tuple(average_precision(truth, side[kind], kind, ids).ap for side in entries) for kind in kinds}
    return Parity(agreement, tuple(1000 * statistics.median(times) for times in seconds), ap)


def _timed(detect: Detect, arguments: tuple) -> tuple[Detections, float]:
    device = arguments[0].device
    start = time.perf_counter()
    found = detect(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found, time.perf_counter() - start
