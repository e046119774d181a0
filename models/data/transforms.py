"""From an image file's pixels to the network's: resize, flip, jitter; boxes, masks and semantic maps along with it.

The numbers follow mmdetection's pipeline: sizes are rounded half up, images are resized as OpenCV's INTER_LINEAR does
(pixel centres at halves, no smoothing when shrinking), masks and maps as its INTER_NEAREST does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of RGB in 0..255, over ImageNet: images are normalised by these."""

DIVISOR = 32
"""Batches are padded to a multiple of this many pixels: the stride of the backbone's last layer."""


@dataclass(frozen=True)
class Augmentation:
    """What training varies."""

    flip: float = 0.5
    """Probability of a horizontal flip."""
    short_sides: Sequence[int] = ()
    """Multi-scale training: the limit of the short side is drawn from these for every image, instead of the one that
    `resize` names. A list, or a range: range(400, 1401) with resize (any, 1600) is the published "400~1400"."""
    scale: tuple[float, float] = (1.0, 1.0)
    """After that, the size is multiplied by a factor drawn from this interval."""
    colour: float = 0.0
    """Brightness, contrast and saturation are multiplied by factors drawn from 1 - colour .. 1 + colour."""

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1 or not 0 <= self.colour < 1:
            raise ValueError(f"augmentation: flip and colour must be in 0..1, got {self.flip} and {self.colour}")
        if len(self.short_sides) and min(self.short_sides) < 1:
            raise ValueError(f"augmentation: short_sides must be above 0, got {self.short_sides}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"augmentation: scale must be (least, most) above 0, got {self.scale}")


@dataclass(frozen=True)
class Sample:
    """One image, ready to be put into a batch. g objects."""

    image: np.ndarray  # uint8 RGB, [h, w, 3] of the network's size, or of the file's where the device resizes
    boxes: np.ndarray  # float32 [g, 4], pixels of the network's size
    labels: np.ndarray  # int64 [g]
    windows: np.ndarray  # int32 [g, 4] (x0, y0, width, height)
    bitmaps: list[np.ndarray]  # g times uint8 [height * width] of the window
    semantic: np.ndarray | None  # uint8 [ceil(h / 8), ceil(w / 8)]
    image_id: int
    original_size: tuple[int, int]  # (height, width)
    scale_factors: tuple[float, float]  # (x, y)
    size: tuple[int, int]  # (height, width), the network's
    instead_of: str | None = None  # where and why another image was broken, whose place this one takes


def resized_size(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """(height, width), aspect kept, of the largest size whose sides are at most `short` and `long`, rounded half up."""
    factor = min(long / max(height, width), short / min(height, width))
    return scaled_size(height, width, factor)


def scaled_size(height: int, width: int, factor: float) -> tuple[int, int]:
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def padded_size(height: int, width: int) -> tuple[int, int]:
    """(height, width), each rounded up to a multiple of DIVISOR."""
    return -(-height // DIVISOR) * DIVISOR, -(-width // DIVISOR) * DIVISOR


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize of uint8 [H, W, 3] to uint8 [h, w, 3], (h, w) = size; centres at halves, no antialias."""
    if image.shape[:2] == tuple(size):
        return image
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return scaled[0].permute(1, 2, 0).numpy()


def nearest_index(source: int, target: int) -> np.ndarray:
    """For each of `target` pixels the pixel of `source` that nearest-neighbour resizing takes: int64 [target]."""
    return np.minimum(np.floor(np.arange(target) * (source / target)).astype(np.int64), source - 1)


def box_windows(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Windows int32 [g, 4] (x0, y0, width, height): the pixels that boxes [g, 4] touch, and 1 more on each side."""
    limit = np.array([width, height])
    low = np.clip(np.floor(boxes[:, :2]).astype(np.int64) - 1, 0, limit - 1)
    high = np.clip(np.ceil(boxes[:, 2:]).astype(np.int64) + 1, low + 1, limit)
    return np.concatenate([low, high - low], axis=1).astype(np.int32)


def jitter_colours(image: np.ndarray, random: np.random.Generator, strength: float) -> np.ndarray:
    """uint8 [h, w, 3], brightness, contrast and saturation times factors drawn from 1 - strength .. 1 + strength."""
    brightness, contrast, saturation = random.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
    pixels = image * brightness
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    pixels = grey[..., None] + saturation * (pixels - grey[..., None])
    pixels = grey.mean() + contrast * (pixels - grey.mean())
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def transform(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    masks: Callable[[int], np.ndarray] | None,
    semantic: np.ndarray | None,
    *,
    image_id: int,
    resize: tuple[int, int] | None,
    augmentation: Augmentation | None = None,
    random: np.random.Generator | None = None,
    resize_image_too: bool = True,
) -> Sample:
    """Bring an image and its ground truth to the network's size.

    Args:
        image: uint8 [H, W, 3] RGB.
        boxes: float32 [g, 4].
        labels: int64 [g].
        masks: gives the mask uint8 [H, W] of object i; called once for each. None: there are none, windows are empty.
        semantic: uint8 [H, W] or None.
        resize: limits (short, long) of the sides, pixels; None: as it is.
        augmentation: None in evaluation.
        random: what the augmentation draws from.
        resize_image_too: False: the image keeps its size, for the device to resize it; all else is resized. Colours are
            then varied before the resizing instead of after it.
    """
    original = image.shape[:2]
    size, flip = original if resize is None else resized_size(*original, *resize), False
    if augmentation is not None:
        size = _varied_size(original, resize, augmentation, random)
        flip = random.random() < augmentation.flip
    if resize_image_too:
        image = resize_image(image, size)
    if augmentation is not None and augmentation.colour > 0:
        image = jitter_colours(image, random, augmentation.colour)

    height, width = size
    rows, columns = nearest_index(original[0], height), nearest_index(original[1], width)
    scale_x, scale_y = width / original[1], height / original[0]
    boxes = np.clip(boxes * np.float32([scale_x, scale_y] * 2), 0, np.float32([width, height] * 2))
    if flip:
        image, columns = image[:, ::-1], columns[::-1]
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    windows = box_windows(boxes, height, width) if masks is not None else np.zeros((len(boxes), 4), np.int32)
    bitmaps = (
        []
        if masks is None
        else [
            masks(index)[rows[y : y + h, None], columns[None, x : x + w]].reshape(-1)
            for index, (x, y, w, h) in enumerate(windows.tolist())
        ]
    )
    if semantic is not None:
        semantic = semantic[rows[::8, None], columns[None, ::8]]
    return Sample(image, boxes, labels, windows, bitmaps, semantic, image_id, original, (scale_x, scale_y), size)


def _varied_size(
    original: tuple[int, int], resize: tuple[int, int] | None, augmentation: Augmentation, random: np.random.Generator
) -> tuple[int, int]:
    short, long = resize or (min(original), max(original))
    if len(augmentation.short_sides):
        short = augmentation.short_sides[int(random.integers(len(augmentation.short_sides)))]
        long = float("inf") if resize is None else long
    factor = min(long / max(original), short / min(original)) * random.uniform(*augmentation.scale)
    return scaled_size(*original, factor)
