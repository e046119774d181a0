"""Resizing, normalising, padding and batching, one image after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor


def preprocess(
    images: Sequence[Tensor],  # uint8 [H, W, 3]
    resize: tuple[float, float] | None = None,
    mean: Sequence[float] = (123.675, 116.28, 103.53),
    std: Sequence[float] = (58.395, 57.12, 57.375),
    divisor: int = 32,
) -> tuple[Tensor, Tensor]:
    """float64 [N, 3, H, W], and int64 [N, 2] (height, width) before padding."""
    scaled = []
    for image in images:
        size = image.shape[:2] if resize is None else resized_size(*image.shape[:2], *resize)
        pixels = resize_image(image.double(), size)
        normalised = (pixels - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std, dtype=torch.float64)
        scaled.append(normalised.permute(2, 0, 1))
    height, width = (-(-max(x.shape[axis] for x in scaled) // divisor) * divisor for axis in (1, 2))
    batch = torch.zeros(len(scaled), 3, height, width, dtype=torch.float64)
    for row, x in zip(batch, scaled, strict=True):
        row[:, : x.shape[1], : x.shape[2]] = x
    return batch, torch.tensor([x.shape[1:] for x in scaled])


def resized_size(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """(height, width) of the largest size, aspect kept, with sides of at most `short` and `long`, rounded half up."""
    factor = min(short / min(height, width), long / max(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def resize_image(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """[H, W, C] -> [h, w, C]: pixel centres at halves, bilinear, the border's value beyond the outermost centres."""
    for axis, target in enumerate(size):
        source = pixels.shape[axis]
        position = (torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5
        position = position.clamp(0, source - 1)
        first = position.floor().long()
        second = (first + 1).clamp(max=source - 1)
        weight = (position - first)[:, None, None].transpose(0, axis)
        pixels = pixels.index_select(axis, first) * (1 - weight) + pixels.index_select(axis, second) * weight
    return pixels
