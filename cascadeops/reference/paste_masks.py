"""Mask pasting as grid_sample(align_corners=False, padding_mode="zeros") does it, written out."""

import torch
from torch import Tensor


def sample_positions(first: Tensor, last: Tensor, cells: int, pixels: int) -> Tensor:
    """Pixel centres on the mask's axis, in cells: first, last [N] (box edges) -> [N, pixels], 0 = centre of cell 0."""
    centres = torch.arange(pixels, dtype=first.dtype) + 0.5
    normalised = (centres - first[:, None]) / (last - first)[:, None] * 2 - 1
    return ((normalised + 1) * cells - 1) / 2


def tap(probs: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """probs[n, row[n, y], column[n, x]], 0 outside of the mask: [N, H, W]."""
    _, h, w = probs.shape
    inside = ((row >= 0) & (row < h))[:, :, None] & ((column >= 0) & (column < w))[:, None, :]
    n = torch.arange(len(probs))[:, None, None]
    values = probs[n, row.clamp(0, h - 1).long()[:, :, None], column.clamp(0, w - 1).long()[:, None, :]]
    return torch.where(inside, values, 0)


def paste_probs(probs: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """probs [N, h, w], boxes [N, 4] -> probabilities at image size [N, H, W]; all 0 for an empty or inverted box."""
    boxes = boxes.to(probs.dtype)
    x = sample_positions(boxes[:, 0], boxes[:, 2], probs.shape[2], image_size[1])
    y = sample_positions(boxes[:, 1], boxes[:, 3], probs.shape[1], image_size[0])
    left, top = x.floor(), y.floor()
    west, north = (x - left)[:, None, :], (y - top)[:, :, None]  # distances from the tap before
    east, south = 1 - west, 1 - north
    pasted = tap(probs, top, left) * (east * south)
    pasted = pasted + tap(probs, top, left + 1) * (west * south)
    pasted = pasted + tap(probs, top + 1, left) * (east * north)
    pasted = pasted + tap(probs, top + 1, left + 1) * (west * north)
    valid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    reached = ((x > -1) & (x < probs.shape[2]))[:, None, :] & ((y > -1) & (y < probs.shape[1]))[:, :, None]
    return torch.where(valid[:, None, None] & reached, pasted, 0)


def paste_masks(probs: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    pasted = paste_probs(probs, boxes, image_size)
    if threshold < 0:
        return (pasted * 255).nan_to_num().clamp(0, 255).to(torch.uint8)
    return pasted >= threshold
