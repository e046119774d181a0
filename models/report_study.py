"""The results of a run's last evaluation beside the data: AP by class and size, errors, confusion, best and worst."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .coco_evaluation import has_masks, mean_precision, precision_table
from .confusion import ImageQuality, confusion, image_qualities
from .data import AnnotatedImages, default_dataset, open_dataset
from .error_kinds import ErrorKinds, error_kinds
from .errors import DataError, UserError, printable
from .overlaps import image_overlaps
from .run_record import RunRecord, read_results

SIZES = ("all", "small", "medium", "large")


@dataclass(frozen=True)
class KindStudy:
    """Of boxes or of masks."""

    precision: np.ndarray
    """float64 [10, 101, C, 4]: `models.coco_evaluation.precision_table`"""
    errors: ErrorKinds
    confusion: np.ndarray
    """int64 [C + 1, C + 1]: `models.confusion.confusion`"""
    qualities: list[ImageQuality]
    """The worst first"""

    def ap(self, label: int | None = None, size: str = "all", threshold: int | None = None) -> float:
        """AP of a class (None: all), of objects of a size, at an IoU threshold (0: 0.50, 5: 0.75; None: all)."""
        precision = self.precision[:, :, :, SIZES.index(size)]
        precision = precision if threshold is None else precision[threshold : threshold + 1]
        return mean_precision(precision if label is None else precision[:, :, label])

    def curve(self, threshold: int | None = None) -> np.ndarray:
        """Precision at the recalls 0:0.01:1, mean over classes (and IoU thresholds): float64 [101]; NaN: no object."""
        precision = self.precision[slice(None) if threshold is None else [threshold], :, :, 0].transpose(1, 0, 2)
        return np.array([mean_precision(at_recall) for at_recall in precision])


@dataclass(frozen=True)
class Study:
    dataset: AnnotatedImages
    ground_truth: Mapping
    class_names: list[str]
    num_objects: np.ndarray
    """int64 [C] of the images evaluated, crowds left out"""
    entries: dict[str, list[dict]]
    """COCO results of "bbox", and of "segm" where there are masks"""
    kinds: dict[str, KindStudy]
    """What they show"""

    @property
    def main_kind(self) -> str:
        """Masks, or boxes where there are none."""
        return "segm" if "segm" in self.kinds else "bbox"

    @property
    def main(self) -> KindStudy:
        return self.kinds[self.main_kind]


@dataclass(frozen=True)
class Subject:
    """A run of a report, and what its last evaluation shows, or why that cannot be said."""

    run: RunRecord
    study: Study | str
    name: str


def study_run(run: RunRecord, data: Path | None) -> Study | str:
    """What the last evaluation shows, or why it cannot be looked at, as a sentence for the reader.

    Args:
        data: the data set's folder; None: where the run found it.
    """
    if not run.evaluations:
        return "The run has not been evaluated yet."
    try:
        return _study(run, _dataset(run, data))
    except UserError as error:
        return "; ".join([error.what, *(text for text in (error.where, error.why) if text)]) + "."
    except OSError as error:  # a name that the system does not take, a folder that may not be read
        return printable(f"The validation data cannot be read: {error}.")


def _dataset(run: RunRecord, data: Path | None) -> AnnotatedImages:
    described = run.data("val")
    folder = data or run.settings.get("data") or described.get("folder")
    if described and folder is None:
        raise DataError("The validation data were a Python object, which is not at hand")
    folder = default_dataset() if folder is None else Path(str(folder))
    return open_dataset(folder, str(run.settings.get("val_split", "val")), semantic="no", boxes_only=_boxes_only(run))


def _boxes_only(run: RunRecord) -> bool:
    return run.settings.get("arch") == "faster_rcnn"


def _study(run: RunRecord, dataset: AnnotatedImages) -> Study:
    ground_truth = dataset.ground_truth()
    classes = run.settings.get("detector.num_classes")
    if classes != dataset.num_classes:
        why = f"the run knows {classes} classes, the data {dataset.num_classes}"
        raise DataError("These are not the data that the run was evaluated on", where=dataset.root, why=why)
    count = min(int(run.evaluations[-1]["images"]), len(dataset))
    image_ids = [dataset.image_info(index).image_id for index in range(count)]
    # Of data opened for boxes alone nobody has looked at the polygons, and pycocotools trusts them.
    with_masks = not _boxes_only(run) and (run.folder / "detections.segm.json").is_file() and has_masks(ground_truth)
    names = ("segm", "bbox") if with_masks else ("bbox",)
    entries = {kind: read_results(run.folder / f"detections.{kind}.json", kind, ground_truth) for kind in names}
    kinds, class_names = {}, []
    for kind, results in entries.items():
        precision, class_names = precision_table(ground_truth, results, kind, image_ids)
        truth = ground_truth | {"categories": sorted(ground_truth["categories"], key=lambda category: category["id"])}
        images = image_overlaps(truth, results, kind, image_ids)
        errors = error_kinds(images, len(class_names))
        kinds[kind] = KindStudy(precision, errors, confusion(images, len(class_names)), image_qualities(images))
    counted = [labels.truth_labels[~labels.crowd] for labels in images]
    num_objects = np.bincount(np.concatenate([np.zeros(0, np.int64), *counted]), minlength=len(class_names))
    return Study(dataset, ground_truth, class_names, num_objects, entries, kinds)


def recorded_ap(run: RunRecord, name: str) -> float:
    """A value of the last evaluation as the run wrote it down, "mask_ap"; NaN where there is none."""
    return run.evaluations[-1].get(name, math.nan) if run.evaluations else math.nan
