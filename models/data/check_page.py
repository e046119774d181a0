"""The findings of a check as one HTML page: a table, and pictures of the first of each kind."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api

from ..errors import UserError, printable
from ..images import path_inside, read_image
from ..page import Html, page, picture, table, tag
from .findings import KINDS, Finding, Findings
from .segmentation import (
    MalformedAnnotation,
    are_numbers,
    beyond,
    check_drawable,
    checked_run_lengths,
    usable_polygons,
)

SIDE = 320
"""Longest side of a picture in pixels."""
LARGEST_SCALE = 8.0
"""Small images are enlarged up to this factor."""

STYLE = "figure { width: 320px; max-width: 100% }"


def check_page(findings: Findings, root: Path, folders: dict[str, Path]) -> str:
    """HTML of the findings.

    Args:
        root: the data set, for the title.
        folders: each split's folder of images.
    """
    rows = [(kind, f"{count:,}", KINDS[kind]) for kind, count in findings.counts.most_common()]
    sections = []
    for kind, examples in findings.examples.items():
        figures = (_figure(finding, annotation, folders.get(finding.split)) for finding, annotation in examples)
        sections += [tag("h2", f"{kind}: {findings.counts[kind]:,}"), tag("div", *figures, class_="pictures")]
    counts = table(("what", "how many", "in training"), rows, [1]) if rows else tag("p", "Nothing is wrong.")
    title = printable(f"Check of {root}")
    return page(title, tag("h1", title), counts, *sections, style=STYLE)


def _figure(finding: Finding, annotation: dict | None, folder: Path | None) -> Html:
    drawn = _picture(finding, annotation, folder) if folder is not None and finding.image else ""
    number = "" if finding.annotation is None else f", annotation {finding.annotation}"
    lines = (f"{finding.split}/{finding.image}{number}", finding.detail, f"--fix: {finding.change}")
    return tag("figure", drawn, tag("figcaption", *(tag("div", printable(line)) for line in lines)))


def _picture(finding: Finding, annotation: dict | None, folder: Path) -> Html | str:
    """The image with the annotation drawn on it, as an <img>; empty if it cannot be read."""
    try:
        image = Image.fromarray(read_image(path_inside(folder, finding.image), upright=False))
    except UserError:
        return ""
    scale = min(LARGEST_SCALE, SIDE / max(image.size))
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    if annotation:
        small = _drawn(small, annotation, (image.height, image.width), scale)
    return picture(np.asarray(small), "")


def _drawn(image: Image.Image, annotation: dict, size: tuple[int, int], scale: float) -> Image.Image:
    """With the mask in blue, the outlines in yellow and the box in red, as far as they can be drawn."""
    segmentation, polygons, mask = annotation.get("segmentation"), [], None
    try:
        if isinstance(segmentation, dict):
            mask = mask_api.decode({"size": list(size), "counts": checked_run_lengths(segmentation, *size)})
        elif isinstance(segmentation, list) and (polygons := usable_polygons(segmentation)):
            check_drawable(*size)
            mask = mask_api.decode(mask_api.merge(mask_api.frPyObjects(polygons, *size)))
    except MalformedAnnotation:
        pass
    if mask is not None:
        covered = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)).astype(bool)
        pixels = np.array(image)
        pixels[covered] = (pixels[covered] * 0.6 + np.array([60, 120, 240]) * 0.4).astype(np.uint8)
        image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image)
    for polygon in polygons:
        points = [(x * scale, y * scale) for x, y in zip(polygon[::2], polygon[1::2], strict=True)]
        pen.line([*points, points[0]], fill=(250, 200, 20))
    box = annotation.get("bbox")
    if isinstance(box, list) and len(box) == 4 and are_numbers(box) and not beyond(box, 1e9):
        # drawn where it meets the image: one far outside would cost time, and shows nothing
        x1, y1 = (float(np.clip(side * scale, -2, SIDE + 2)) for side in box[:2])
        x2, y2 = (float(np.clip((box[i] + box[i + 2]) * scale, -2, SIDE + 2)) for i in (0, 1))
        pen.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=(230, 40, 40), width=2)
    return image
