"""Pictures of detections, drawn with Pillow: translucent masks, crisp outlines, thin boxes, names that can be read."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_api

from .files import atomic_write

# Okabe and Ito, "Color Universal Design" (2008), without black: told apart with every common colour blindness
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
SMALLEST_SIDE = 480
"""Smaller pictures are enlarged by a whole factor until their short side has this many pixels: names need the room."""
OPACITY = 0.42


def overlay(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
    masks: Sequence[Mapping] | None = None,
) -> np.ndarray:
    """`image` with objects drawn on it: uint8 RGB [H * scale, W * scale, 3], see SMALLEST_SIDE.

    Args:
        image: uint8 RGB [H, W, 3].
        boxes: [D, 4] (x1, y1, x2, y2) in pixels of `image`.
        labels: [D] indices into `class_names`.
        scores: [D], shown behind the names; None for ground truth.
        masks: D COCO RLE dicts of the size of `image`.
    """
    scale = max(1, -(-SMALLEST_SIDE // min(image.shape[:2])))
    height, width = image.shape[0] * scale, image.shape[1] * scale
    # bilinear is the mildest filter that does not show blocks
    pixels = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale
    labels = np.asarray(labels, dtype=np.int64).reshape(-1)
    line = min(4, round(min(height, width) / 320))

    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-areas, kind="stable")  # small objects are painted over large ones
    if masks is not None:
        for index in order:
            _paint_mask(pixels, masks[index], scale, _colour(labels[index]), line)
    canvas = Image.fromarray(pixels)
    draw = ImageDraw.Draw(canvas)
    for index in order:
        x1, y1, x2, y2 = boxes[index].round().astype(int).tolist()
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=_colour(labels[index]), width=line)
    texts = [class_names[label] for label in labels]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, np.asarray(scores), strict=True)]
    font = ImageFont.load_default(size=max(12, round(min(height, width) / 40)))
    taken: list[tuple[int, int, int, int]] = []
    for text, box, label in zip(texts, boxes, labels, strict=True):
        taken.append(_write_name(draw, text, box, _colour(label), font, (width, height), taken))
    return np.asarray(canvas)


def comparison_grid(rows: Sequence[tuple[np.ndarray, np.ndarray]], pairs_per_row: int = 2) -> np.ndarray:
    """Ground truth beside detections, pair after pair, as one picture: uint8 RGB.

    Args:
        rows: (ground truth, detections) pictures, uint8 RGB of any size.
        pairs_per_row: pairs beside each other.
    """
    side, gap, title = SMALLEST_SIDE, 6, 32
    columns = max(1, min(pairs_per_row, len(rows)))
    pair_width = 2 * side + 4 * gap
    cells = [[Image.fromarray(pixels) for pixels in pair] for pair in rows]
    for cell in (cell for pair in cells for cell in pair):
        cell.thumbnail((side, side), Image.Resampling.LANCZOS)
    lines = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for pair in line for cell in pair) for line in lines]
    sheet = Image.new("RGB", (columns * pair_width, title + sum(heights) + gap * len(lines)), (24, 24, 27))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    top = title
    for line, height in zip(lines, heights, strict=True):
        for column, pair in enumerate(line):
            for half, (cell, text) in enumerate(zip(pair, ("ground truth", "detections"), strict=True)):
                # the two of a pair touch, however narrow they are
                left = column * pair_width + gap + (side + gap if half else side - cell.width)
                sheet.paste(cell, (left, top + (height - cell.height) // 2))
                if top == title:
                    draw.text((left, 5), text, fill=(228, 228, 231), font=font)
        top += height + gap
    return np.asarray(sheet)


def save_picture(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Writes uint8 RGB [H, W, 3] as .jpg or .png, by the name, atomically."""
    kind = "PNG" if str(path).lower().endswith(".png") else "JPEG"
    with atomic_write(path) as file:
        # full-resolution colour: halved, thin coloured lines would smear
        Image.fromarray(pixels).save(file, format=kind, **({"quality": 92, "subsampling": 0} if kind == "JPEG" else {}))


def _colour(label: int) -> tuple[int, int, int]:
    """A colour for each class: the palette, then the palette darker, then lighter, and again."""
    turn, place = divmod(int(label), len(PALETTE))
    other, share = (((0, 0, 0), 0.0), ((0, 0, 0), 0.35), ((255, 255, 255), 0.45))[turn % 3]
    return tuple(round(a * (1 - share) + b * share) for a, b in zip(PALETTE[place], other, strict=True))


def _paint_mask(pixels: np.ndarray, rle: Mapping, scale: int, colour: tuple[int, int, int], line: int) -> None:
    """Blends the mask's colour into `pixels`, and draws its inner edge opaque; touches only the mask's own box."""
    x, y, width, height = mask_api.toBbox(rle).astype(int)
    if width <= 0 or height <= 0:
        return
    mask = mask_api.decode(rle)[y : y + height, x : x + width]
    if scale > 1:  # interpolated, so that an enlarged outline is a curve and no staircase
        grey = np.pad(mask, 1) * np.uint8(255)
        size = ((width + 2) * scale, (height + 2) * scale)
        mask = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR)) >= 128
        mask = mask[scale:-scale, scale:-scale]
    mask = mask.astype(bool)
    padded = np.pad(mask, line)
    inside = mask.copy()
    for shift in range(1, line + 1):
        for dy, dx in ((shift, 0), (-shift, 0), (0, shift), (0, -shift)):
            inside &= padded[line + dy : line + dy + mask.shape[0], line + dx : line + dx + mask.shape[1]]
    region = pixels[y * scale : (y + height) * scale, x * scale : (x + width) * scale]
    blended = region * (1 - OPACITY) + np.array(colour) * OPACITY
    region[mask] = blended.astype(np.uint8)[mask]
    region[mask & ~inside] = colour


def _write_name(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: np.ndarray,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Writes a name at its box: where it hides least of the names before it, and always inside the picture."""
    ascent, descent = font.getmetrics()
    margin = max(2, ascent // 5)
    width, height = round(draw.textlength(text, font=font)) + 2 * margin, ascent + descent
    x1, y1, x2, y2 = box.round().astype(int).tolist()
    wishes = [
        (x1, y1 - height),
        (x1, y1),
        (x2 - width, y1 - height),
        (x1, y2),
        (x2 - width, y2 - height),
        (x2 - width, y2),
    ]
    places = []
    for number, (x, y) in enumerate(wishes):
        inside_x, inside_y = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
        place = (inside_x, inside_y, inside_x + width, inside_y + height)
        pushed = abs(inside_x - x) + abs(inside_y - y)  # away from its box, by the picture's edge
        places.append((sum(_overlap(place, other) for other in taken), pushed, number, place))
    place = min(places)[-1]
    draw.rectangle(place, fill=colour)
    # ITU-R BT.601 luma decides between black and white letters
    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 128
    draw.text((place[0] + margin, place[1]), text, fill=(255, 255, 255) if dark else (0, 0, 0), font=font, anchor="la")
    return place


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
