"""The findings of a check as one HTML page: a table, and pictures of the first of each kind. It loads nothing."""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api

from ..errors import UserError
from ..images import path_inside, read_image
from .findings import KINDS, Finding, Findings
from .segmentation import MalformedAnnotation, are_numbers, checked_run_lengths, usable_polygons

SIDE = 320
"""Longest side of a picture in pixels."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1f2328 }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid #d0d7de }
td.number { text-align: right } .pictures { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 320px } img { max-width: 100%; display: block }
figcaption { font-size: 13px; overflow-wrap: anywhere }
"""


def check_page(findings: Findings, root: Path, folders: dict[str, Path]) -> str:
    """HTML of the findings.

    Args:
        root: the data set, for the title.
        folders: each split's folder of images.
    """
    rows = "".join(
        f'<tr><td>{kind}</td><td class="number">{count:,}</td><td>{KINDS[kind]}</td></tr>'
        for kind, count in findings.counts.most_common()
    )
    sections = "".join(
        f"<h2>{kind}: {findings.counts[kind]:,}</h2><div class=pictures>"
        + "".join(_figure(finding, annotation, folders.get(finding.split)) for finding, annotation in examples)
        + "</div>"
        for kind, examples in findings.examples.items()
    )
    table = f"<table><tr><th>what<th>how many<th>in training</tr>{rows}</table>" if rows else "<p>Nothing is wrong.</p>"
    title = html.escape(f"Check of {root}")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return f"{head}<h1>{title}</h1>{table}{sections}</html>\n"


def _figure(finding: Finding, annotation: dict | None, folder: Path | None) -> str:
    picture = _picture(finding, annotation, folder) if folder is not None and finding.image else ""
    number = "" if finding.annotation is None else f", annotation {finding.annotation}"
    lines = (f"{finding.split}/{finding.image}{number}", finding.detail, f"--fix: {finding.change}")
    return f"<figure>{picture}<figcaption>{'<br>'.join(map(html.escape, lines))}</figcaption></figure>"


def _picture(finding: Finding, annotation: dict | None, folder: Path) -> str:
    """The image with the annotation drawn on it, as an <img>; empty if it cannot be read."""
    try:
        image = Image.fromarray(read_image(path_inside(folder, finding.image), upright=False))
    except UserError:
        return ""
    scale = min(1.0, SIDE / max(image.size))
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    if annotation:
        small = _drawn(small, annotation, (image.height, image.width), scale)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _drawn(picture: Image.Image, annotation: dict, size: tuple[int, int], scale: float) -> Image.Image:
    """With the mask in blue, the outlines in yellow and the box in red, as far as they can be drawn."""
    segmentation, polygons, mask = annotation.get("segmentation"), [], None
    try:
        if isinstance(segmentation, dict):
            mask = mask_api.decode({"size": list(size), "counts": checked_run_lengths(segmentation, *size)})
        elif isinstance(segmentation, list) and (polygons := usable_polygons(segmentation)):
            mask = mask_api.decode(mask_api.merge(mask_api.frPyObjects(polygons, *size)))
    except MalformedAnnotation:
        pass
    if mask is not None:
        covered = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST)).astype(bool)
        pixels = np.array(picture)
        pixels[covered] = (pixels[covered] * 0.6 + np.array([60, 120, 240]) * 0.4).astype(np.uint8)
        picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    for polygon in polygons:
        points = [(x * scale, y * scale) for x, y in zip(polygon[::2], polygon[1::2], strict=True)]
        pen.line([*points, points[0]], fill=(250, 200, 20))
    box = annotation.get("bbox")
    if isinstance(box, list) and len(box) == 4 and are_numbers(box):
        # drawn where it meets the picture: one far outside would cost time, and shows nothing
        x1, y1 = (float(np.clip(side * scale, -2, SIDE + 2)) for side in box[:2])
        x2, y2 = (float(np.clip((box[i] + box[i + 2]) * scale, -2, SIDE + 2)) for i in (0, 1))
        pen.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=(230, 40, 40), width=2)
    return picture
