"""From an image file's pixels to the network's: resize, flip, jitter; boxes, masks and semantic maps along with it.

The numbers follow mmdetection's pipeline: sizes are rounded half up, images are resized as OpenCV's INTER_LINEAR does
(pixel centres at halves, no smoothing when shrinking), masks and maps as its INTER_NEAREST does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class TransformSettings:
    """How images are brought to the network. Pixels are RGB in 0..255."""

    short: Sequence[int] | None = (800,)
    """Limits of the short side, pixels; in training one is drawn for every image, in evaluation the first is taken. A
    `range` is a good list: multi-scale training uses range(400, 1401). None: images keep their size."""
    long: int = 1333
    """Limit of the long side, pixels."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    colour: float = 0.0
    """Strength of brightness, contrast and saturation jitter in training: factors are uniform in 1 - s .. 1 + s."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    divisor: int = 32
    """Batches are padded to a multiple of this, pixels: the largest stride of the backbone."""

    def __post_init__(self) -> None:
        if self.short is not None and (len(self.short) == 0 or min(self.short) < 1 or self.long < 1):
            raise ValueError(f"transforms: short and long must be above 0, got {self.short} and {self.long}")
        if not 0 <= self.flip <= 1 or not 0 <= self.colour < 1:
            raise ValueError(f"transforms: flip must be in 0..1 and colour in 0..1, got {self.flip}, {self.colour}")
        if self.divisor < 8 or self.divisor % 8:
            raise ValueError(f"transforms: divisor must be a multiple of 8, got {self.divisor}")


@dataclass(frozen=True)
class Sample:
    """One image, ready to be put into a batch. g objects."""

    image: np.ndarray  # uint8 [h, w, 3] RGB
    boxes: np.ndarray  # float32 [g, 4]
    labels: np.ndarray  # int64 [g]
    windows: np.ndarray  # int32 [g, 4] (x0, y0, width, height)
    bitmaps: list[np.ndarray]  # g times uint8 [height * width] of the window
    semantic: np.ndarray | None  # uint8 [ceil(h / 8), ceil(w / 8)]
    image_id: int
    original_size: tuple[int, int]  # (height, width)
    scale_factors: tuple[float, float]  # (x, y)


def resized_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """(height, width) after scaling to at most `short` x `long` with the aspect kept."""
    factor = min(long / max(height, width), short / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


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
    """The whole pixels that boxes [g, 4] cover, and 1 more on each side, within the image: int32 [g, 4] (x, y, w, h)."""
    limit = np.array([width, height])
    low = np.clip(np.floor(boxes[:, :2]).astype(np.int64) - 1, 0, limit - 1)
    high = np.clip(np.ceil(boxes[:, 2:]).astype(np.int64) + 1, low + 1, limit)
    return np.concatenate([low, high - low], axis=1).astype(np.int32)


def jitter_colours(image: np.ndarray, random: np.random.Generator, strength: float) -> np.ndarray:
    """Brightness, contrast and saturation of uint8 [h, w, 3], each changed by a factor in 1 - strength .. 1 + strength."""
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
    masks: Callable[[int], np.ndarray],
    semantic: np.ndarray | None,
    image_id: int,
    settings: TransformSettings,
    random: np.random.Generator | None,
) -> Sample:
    """Apply `settings` to an image and its ground truth.

    Args:
        image: uint8 [H, W, 3] RGB.
        boxes: float32 [g, 4]; labels: int64 [g].
        masks: gives the mask uint8 [H, W] of object i. One is held at a time.
        semantic: uint8 [H, W] or None.
        random: source of the augmentation; None in evaluation, which has none.
    """
    height, width = image.shape[:2]
    size = (height, width)
    flip = False
    if settings.short is not None:
        short = settings.short[0 if random is None else int(random.integers(len(settings.short)))]
        size = resized_size(height, width, short, settings.long)
    if random is not None:
        flip = bool(random.random() < settings.flip)
    image = resize_image(image, size)
    if random is not None and settings.colour > 0:
        image = jitter_colours(image, random, settings.colour)

    rows, columns = nearest_index(height, size[0]), nearest_index(width, size[1])
    scale_x, scale_y = size[1] / width, size[0] / height
    boxes = boxes * np.array([scale_x, scale_y, scale_x, scale_y], np.float32)
    boxes = np.clip(boxes, 0, np.array([size[1], size[0], size[1], size[0]], np.float32))
    if flip:
        image, columns = image[:, ::-1], columns[::-1]
        boxes = np.stack([size[1] - boxes[:, 2], boxes[:, 1], size[1] - boxes[:, 0], boxes[:, 3]], axis=1)

    windows = box_windows(boxes, *size)
    bitmaps = []
    for index, (x, y, w, h) in enumerate(windows.tolist()):
        bitmaps.append(masks(index)[rows[y : y + h, None], columns[None, x : x + w]].reshape(-1))
    if semantic is not None:
        semantic = semantic[rows[::8, None], columns[None, ::8]]
    return Sample(image, boxes, labels, windows, bitmaps, semantic, image_id, (height, width), (scale_x, scale_y))
