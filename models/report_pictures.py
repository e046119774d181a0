"""The images of a report: what is there, and beside it what each run found in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from .coco_evaluation import bytes_rle, truth_rle
from .confusion import SCORE, ImageQuality
from .errors import UserError
from .page import Html, escape, join, picture, tag
from .report_study import Study
from .visualise import overlay

SIDES = {1: 440, 2: 340}
"""Number of runs -> longest side of a picture in pixels: a page stays below 5 MB even if the images are noise."""

STYLE = """
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 1.4rem }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 4px } .row img { width: 100%; height: auto }
.row span { font-size: 12px; color: var(--soft); display: block }
"""


class Pictures:
    """Draws images of a data set that one or two runs were evaluated on."""

    def __init__(self, studies: Sequence[Study], names: Sequence[str]):
        self._studies, self._names = studies, names
        first = studies[0]
        self._index = {first.dataset.image_info(i).image_id: i for i in range(len(first.dataset))}
        self._label_of = {int(key): label for label, key in enumerate(first.dataset.category_ids)}
        self._truth = _by_image(first.ground_truth["annotations"])
        self._found = [_by_image(study.entries.get("segm", study.entries["bbox"])) for study in studies]
        self._boxes = [_by_image(study.entries["bbox"]) for study in studies]

    def row(self, image_id: int, *qualities: ImageQuality | None) -> Html:
        """The image as a <figure>: the objects, and for each run what it found, with its quality."""
        info = self._studies[0].dataset.image_info(self._index[image_id])
        try:
            image = self._studies[0].dataset.image(self._index[image_id])
        except UserError as error:
            return tag("figure", tag("figcaption", f"{info.file_name}: {error.what}"))
        side = SIDES[len(self._names)]
        cells = [_cell("there", f"objects of {info.file_name}", self._with_objects(image, image_id), side)]
        for number, name in enumerate(self._names):
            title = name if len(self._names) > 1 else "found"
            alt = f"{name}: found in {info.file_name}"
            cells.append(_cell(title, alt, self._with_found(image, image_id, number), side))
        words = [_words(quality) for quality in qualities]
        if len(self._names) > 1:
            words = [f"{name}: {text}" for name, text in zip(self._names, words, strict=True)]
        caption = tag("figcaption", tag("b", info.file_name), "  ", join(_lines(words)))
        return tag("figure", tag("div", *cells, class_="row"), caption)

    def _with_objects(self, image: np.ndarray, image_id: int) -> np.ndarray:
        objects = [truth for truth in self._truth.get(image_id, ()) if not truth.get("iscrowd")]
        masks = None
        if objects and "segm" in self._studies[0].entries:
            masks = [truth_rle(truth.get("segmentation"), *image.shape[:2]) for truth in objects]
        return self._drawn(image, objects, None, masks)

    def _with_found(self, image: np.ndarray, image_id: int, number: int) -> np.ndarray:
        found = [entry for entry in self._found[number].get(image_id, ()) if entry["score"] >= SCORE]
        boxes = [entry for entry in self._boxes[number].get(image_id, ()) if entry["score"] >= SCORE]
        masks = None
        if "segm" in self._studies[number].entries:
            masks = [bytes_rle(entry["segmentation"]) for entry in found]
        same = [(b["score"], b["category_id"]) for b in boxes] == [(f["score"], f["category_id"]) for f in found]
        scores = np.array([entry["score"] for entry in found])
        return self._drawn(image, boxes if same else [_with_box(entry) for entry in found], scores, masks)

    def _drawn(self, image: np.ndarray, objects: Sequence[Mapping], scores, masks) -> np.ndarray:
        corners = [[x, y, x + width, y + height] for x, y, width, height in (one["bbox"] for one in objects)]
        limit = 2.0 * max(image.shape[:2])  # a box may claim to be anywhere; one far outside shows nothing
        labels = [self._label_of[one["category_id"]] for one in objects]
        names = self._studies[0].dataset.class_names
        return overlay(image, np.clip(np.reshape(corners, (-1, 4)), -limit, limit), labels, names, scores, masks)


def _by_image(entries: Sequence[Mapping]) -> dict[int, list[Mapping]]:
    result: dict[int, list[Mapping]] = {}
    for entry in entries:
        result.setdefault(entry["image_id"], []).append(entry)
    return result


def _with_box(entry: Mapping) -> dict:
    from pycocotools import mask as mask_api

    return dict(entry) | {"bbox": mask_api.toBbox(bytes_rle(entry["segmentation"])).tolist()}


def _cell(title: str, alt: str, pixels: np.ndarray, side: int) -> Html:
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return tag("div", tag("span", title), picture(np.asarray(image), alt))


def _words(quality: ImageQuality | None) -> str:
    if quality is None:
        return "no object and no detection"
    return f"quality {quality.quality:.2f}, {quality.found} of {quality.objects} found, {quality.wrong} wrong"


def _lines(words: Sequence[str]) -> list[Html]:
    return [Html(("<br>" if i else "") + escape(text)) for i, text in enumerate(words)]
