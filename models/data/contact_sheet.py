"""One picture that shows what a COCO-layout folder holds: images, each beside a copy with masks and names drawn on."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from ..images import path_inside, read_image

COLOURS = (
    (230, 60, 60),
    (60, 120, 240),
    (250, 170, 20),
    (170, 70, 220),
    (20, 170, 120),
    (240, 90, 180),
    (0, 190, 220),
    (150, 110, 60),
)
"""One for each class, then again from the start."""


def contact_sheet(folder: Path, split: str, rows: int = 4, columns: int = 4, scale: int = 2) -> Image.Image:
    """The first rows * columns pictures of `split`, each beside a copy with masks, boxes and names drawn on."""
    content = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    shown = content["images"][: rows * columns]
    of_image: dict[int, list[dict]] = {image["id"]: [] for image in shown}
    for annotation in content["annotations"]:
        if annotation["image_id"] in of_image:
            of_image[annotation["image_id"]].append(annotation)
    side = max(max(image["height"], image["width"]) for image in shown) * scale
    gap, margin = 4, 12
    cell_width, cell_height = 2 * side + gap + margin, side + margin
    columns, rows = min(columns, len(shown)), -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), (255, 255, 255))
    for index, entry in enumerate(shown):
        picture = Image.fromarray(read_image(path_inside(folder / split, entry["file_name"]), upright=False))
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BILINEAR)
        drawn = _with_annotations(picture, entry, of_image[entry["id"]], names, scale)
        left = margin + index % columns * cell_width + side - picture.width  # the pair meets in the cell's middle
        top = margin + index // columns * cell_height + (side - picture.height) // 2
        sheet.paste(picture, (left, top))
        sheet.paste(drawn, (left + picture.width + gap, top))
    return sheet


def _with_annotations(
    picture: Image.Image, entry: dict, annotations: list[dict], names: dict[int, str], scale: int
) -> Image.Image:
    pixels = np.asarray(picture).astype(np.float32)
    for annotation in annotations:
        mask = _mask(annotation["segmentation"], entry["height"], entry["width"])
        mask = mask.repeat(scale, axis=0).repeat(scale, axis=1)
        pixels[mask] += 0.55 * (np.array(_colour(annotation), np.float32) - pixels[mask])
    drawn = Image.fromarray(pixels.astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for annotation in annotations:
        x, y, width, height = (value * scale for value in annotation["bbox"])
        pen.rectangle((x, y, x + width - 1, y + height - 1), outline=_colour(annotation))
        text = names[annotation["category_id"]] + (" (crowd)" if annotation["iscrowd"] else "")
        _, _, right, bottom = pen.textbbox((0, 0), text)
        x, y = min(x, drawn.width - right - 2), max(y - bottom - 2, 0)
        pen.rectangle((x, y, x + right + 2, y + bottom + 1), fill=_colour(annotation))
        pen.text((x + 1, y), text, fill=(255, 255, 255))
    return drawn


def _colour(annotation: dict) -> tuple[int, int, int]:
    return COLOURS[(annotation["category_id"] - 1) % len(COLOURS)]


def _mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, list):
        runs = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = coco_mask.frPyObjects(segmentation, height, width)
    else:
        runs = segmentation
    return coco_mask.decode(runs).astype(bool)
