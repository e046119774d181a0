"""COCO average precision of boxes and masks, and the results files that every COCO tool reads.

pycocotools is the definition; faster-coco-eval computes the same numbers sooner and is used where it is installed.
"""

import contextlib
import io
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_api

from .data.annotations import reason_to_leave_out
from .data.segmentation import MalformedAnnotation, usable_polygons
from .errors import DataError
from .files import write_json
from .voc_evaluation import VocPrecision

try:
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval


@dataclass(frozen=True)
class AveragePrecision:
    """AP in 0..1 at 100 detections an image; NaN where there is nothing to find (no large object, say)."""

    ap: float
    """mean over IoU 0.50:0.05:0.95 and classes"""
    ap50: float
    ap75: float
    small: float
    """objects under 32 x 32 pixels, by the area of the annotation"""
    medium: float
    large: float
    """objects over 96 x 96 pixels"""
    per_class: dict[str, float]
    """class name -> ap"""


@dataclass(frozen=True)
class Metrics:
    """What an evaluation gives."""

    box: AveragePrecision
    mask: AveragePrecision | None
    """None where the annotations hold no masks, or the detector gives none"""
    images: int
    images_per_second: float
    """forward pass and mask pasting, without reading and decoding"""
    voc: VocPrecision | None = None
    """VOC's own AP of boxes at IoU 0.5, where the data set is one of VOC's"""

    def flat(self) -> dict[str, float]:
        """{"box_ap": ..., "mask_ap50": ..., "mask_ap/circle": ...}, as in metrics.jsonl; undefined values left out."""
        values = {"images": self.images, "images_per_second": self.images_per_second}
        for kind, precision in (("box", self.box), ("mask", self.mask)):
            if precision is not None:
                numbers = asdict(precision)
                per_class = numbers.pop("per_class")
                values |= {f"{kind}_{key if key.startswith('ap') else 'ap_' + key}": x for key, x in numbers.items()}
                values |= {f"{kind}_ap/{name}": x for name, x in per_class.items()}
        if self.voc is not None:
            values |= {"voc_map": self.voc.mean} | {f"voc_ap/{name}": x for name, x in self.voc.per_class.items()}
        return {key: value for key, value in values.items() if not math.isnan(value)}


def result_entries(
    image_id: int,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    masks: Sequence[Mapping] | None,
    category_ids: Sequence[int],
) -> dict[str, list[dict]]:
    """One image's detections as COCO results: {"bbox": [...], "segm": [...]}, without "segm" where there are no masks.

    Mask entries carry no box, so that COCO tools take an object's size from its mask. Boxes are rounded to a thousandth
    of a pixel; scores are kept as they are, since rounding would make ties.

    Args:
        boxes: [D, 4] (x1, y1, x2, y2) in pixels of the original image.
        scores, labels: [D].
        masks: D COCO RLE dicts of the original image's size, or None for a detector without masks.
        category_ids: [C] the data set's category id of each label.
    """
    heads = [
        {"image_id": int(image_id), "category_id": int(category_ids[label]), "score": float(score)}
        for label, score in zip(labels, scores, strict=True)
    ]
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    corners_sizes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).round(3).tolist()
    entries = {"bbox": [head | {"bbox": box} for head, box in zip(heads, corners_sizes, strict=True)]}
    if masks is not None:
        entries["segm"] = [head | {"segmentation": _text_rle(mask)} for head, mask in zip(heads, masks, strict=True)]
    return entries


def write_results(folder: Path, entries: Mapping[str, list[dict]]) -> list[Path]:
    """Writes detections.bbox.json and detections.segm.json, as far as `entries` has them; returns their paths."""
    paths = {kind: Path(folder) / f"detections.{kind}.json" for kind in entries}
    for kind, path in paths.items():
        write_json(path, entries[kind])
    return list(paths.values())


def average_precision(
    ground_truth: Mapping, entries: Sequence[Mapping], kind: str, image_ids: Sequence[int] | None = None
) -> AveragePrecision:
    """COCO average precision; arguments and errors as of `precision_table`."""
    precision, names = precision_table(ground_truth, entries, kind, image_ids)
    return AveragePrecision(
        ap=mean_precision(precision[:, :, :, 0]),
        ap50=mean_precision(precision[0, :, :, 0]),
        ap75=mean_precision(precision[5, :, :, 0]),
        small=mean_precision(precision[:, :, :, 1]),
        medium=mean_precision(precision[:, :, :, 2]),
        large=mean_precision(precision[:, :, :, 3]),
        per_class={name: mean_precision(precision[:, :, k, 0]) for k, name in enumerate(names)},
    )


def precision_table(
    ground_truth: Mapping, entries: Sequence[Mapping], kind: str, image_ids: Sequence[int] | None = None
) -> tuple[np.ndarray, list[str]]:
    """COCO's precisions, of which every AP is a mean, and the names of the classes.

    Args:
        ground_truth: a COCO annotation file's content. Left unchanged. A missing `iscrowd` is 0, a missing `area` the
            mask's or, without masks, the box's.
        entries: results as in `result_entries`, of one kind; may be empty. Left unchanged.
        kind: "bbox" or "segm".
        image_ids: score these images only; all by default.

    Returns:
        float64 [10, 101, C, 4] by IoU threshold (0.50:0.05:0.95), recall (0:0.01:1), class, and size (all, small,
        medium, large), at 100 detections; -1 where there is no object.

    Raises:
        DataError: a result names an unknown image; or of an annotation, see `scored_objects`.
    """
    chosen = {image["id"] for image in ground_truth["images"]} if image_ids is None else set(image_ids)
    unknown = {entry["image_id"] for entry in entries} - chosen
    if unknown:
        raise DataError(
            "the results name images that are not scored",
            where=f"image_id {', '.join(map(str, sorted(unknown)[:5]))}",
            why=f"{len(unknown)} of their image ids are not among the {len(chosen)} of the annotations",
            fix="evaluate on the annotations of the same images",
        )
    with contextlib.redirect_stdout(io.StringIO()):  # both libraries print their progress
        truth = _index(ground_truth, chosen, _truth_annotations(ground_truth, chosen, kind))
        found = _index(ground_truth, chosen, [_detection(entry, kind, i) for i, entry in enumerate(entries, 1)])
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    precision = np.asarray(evaluation.eval["precision"])[..., -1]
    return precision, [names[key] for key in evaluation.params.catIds]


def has_masks(ground_truth: Mapping) -> bool:
    """Whether mask AP can be computed: some object has a mask."""
    return any(_usable_segmentation(annotation) for annotation in ground_truth["annotations"])


def scored_objects(ground_truth: Mapping, image_ids: Container[int], kind: str) -> Iterator[Mapping]:
    """The annotations of these images that are scored, as they are; by mask with their usable polygons alone.

    By mask, an annotation without a mask (run lengths, or a polygon of 3 points or more) is left out where training
    leaves it out; the reader of the annotations has counted it then.

    Args:
        kind: "bbox" or "segm".

    Raises:
        DataError: by mask, an annotation has no segmentation at all, which training refuses; or a malformed one.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    for annotation in ground_truth["annotations"]:
        if annotation["image_id"] not in image_ids:
            continue
        if kind == "segm":
            segmentation = _usable_segmentation(annotation)
            if not segmentation:
                _check_is_left_out(annotation, *sizes[annotation["image_id"]])
                continue
            annotation = dict(annotation) | {"segmentation": segmentation}
        yield annotation


def _usable_segmentation(annotation: Mapping) -> list | Mapping | None:
    """Without polygons of fewer than 3 points: pycocotools takes 4 numbers for a box."""
    segmentation = annotation.get("segmentation")
    if not isinstance(segmentation, list):
        return segmentation
    try:
        return usable_polygons(segmentation)
    except MalformedAnnotation as error:
        raise DataError("an annotation is malformed", where=_place(annotation), why=error) from error


def _check_is_left_out(annotation: Mapping, height: int, width: int) -> None:
    polygons = isinstance(annotation.get("segmentation"), list)
    if not polygons and not reason_to_leave_out(annotation, height, width):
        raise DataError(
            "an annotation has no mask, so mask AP cannot be computed",
            where=_place(annotation),
            fix="give it a segmentation (polygons or RLE), or remove it",
        )


def _place(annotation: Mapping) -> str:
    return f"annotation id {annotation.get('id')} of image id {annotation['image_id']}"


def _truth_annotations(ground_truth: Mapping, chosen: set[int], kind: str) -> list[dict]:
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    result = []
    for annotation in scored_objects(ground_truth, chosen, kind):
        area = annotation.get("area")
        if area is None:
            width, height = annotation["bbox"][2:]
            area = width * height
            if segmentation := _usable_segmentation(annotation):
                area = float(mask_api.area(truth_rle(segmentation, *sizes[annotation["image_id"]])))
        # numbered afresh from 1: pycocotools takes an object of id 0 for "no object"
        numbered = {"id": len(result) + 1, "iscrowd": annotation.get("iscrowd", 0), "area": area}
        result.append(dict(annotation) | numbered)
    return result


def _detection(entry: Mapping, kind: str, number: int) -> dict:
    """A result with what COCO.loadRes adds to it: an id, and the area that decides small, medium and large."""
    if kind == "bbox":
        area = entry["bbox"][2] * entry["bbox"][3]
    else:
        area = float(mask_api.area(bytes_rle(entry["segmentation"])))
    return dict(entry) | {"id": number, "iscrowd": 0, "area": area}


def _index(ground_truth: Mapping, chosen: set[int], annotations: list[dict]) -> COCO:
    coco = COCO()
    images = [image for image in ground_truth["images"] if image["id"] in chosen]
    coco.dataset = {"images": images, "categories": list(ground_truth["categories"]), "annotations": annotations}
    coco.createIndex()
    return coco


def truth_rle(segmentation: list | Mapping | None, height: int, width: int) -> dict:
    """An annotation's polygons or run lengths as pycocotools takes them; without a usable polygon, an empty mask.

    Raises:
        MalformedAnnotation: polygons that are no numbers, or too large.
    """
    if isinstance(segmentation, list) and (polygons := usable_polygons(segmentation)):
        return mask_api.merge(mask_api.frPyObjects(polygons, height, width))
    if not isinstance(segmentation, Mapping):
        segmentation = {"size": [height, width], "counts": [height * width]}
    if isinstance(segmentation["counts"], list):
        return mask_api.frPyObjects(segmentation, height, width)
    return bytes_rle(segmentation)


def _text_rle(rle: Mapping) -> dict:
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }


def bytes_rle(rle: Mapping) -> dict:
    """Run lengths as pycocotools takes them, of those that JSON holds."""
    counts = rle["counts"]
    return {"size": rle["size"], "counts": counts.encode() if isinstance(counts, str) else counts}


def mean_precision(precision: np.ndarray) -> float:
    """The mean of what `precision_table` gives, or of a part of it; NaN where there is no object."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else math.nan
