"""Masks pasted into boxes of whole pixels, as mmdetection 1, maskrcnn-benchmark and torchvision do.

`cascadeops.paste_masks_rle` samples a mask at the centres of the image's pixels instead; this is for weights whose
published numbers were made the old way. One mask after the other, on the host.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def whole_pixel_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int], border: int) -> list[dict]:
    """COCO run lengths of masks that are resized to their boxes' whole pixels.

    Args:
        masks: [D, M, M] probabilities; a pixel above 0.5 is part of the object.
        boxes: [D, 4] first and last pixel (x1, y1, x2, y2); truncated.
        image_size: (height, width) in pixels.
        border: rows and columns of zeros around a mask; its box grows likewise.

    Returns:
        D encodings {"size": [H, W], "counts": bytes}.
    """
    from pycocotools import mask as mask_api

    if border > 0:
        half_size = (boxes[:, 2:] - boxes[:, :2]) * (0.5 * (masks.shape[-1] + 2 * border) / masks.shape[-1])
        centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
        boxes, masks = torch.cat([centre - half_size, centre + half_size], dim=-1), F.pad(masks, (border,) * 4)
    encoded = []
    for mask, box in zip(masks.float().cpu(), boxes.int().tolist(), strict=True):
        canvas = np.zeros(image_size, dtype=np.uint8, order="F")
        _paste(canvas, mask, box[:2], box[2:])
        encoded.append(mask_api.encode(canvas))
    return encoded


def _paste(canvas: np.ndarray, mask: Tensor, first: list[int], last: list[int]) -> None:
    """Sets the pixels of canvas [H, W] that belong to the mask between (x, y) `first` and `last`, both included."""
    width, height = (max(end - start + 1, 1) for start, end in zip(first, last, strict=True))
    resized = F.interpolate(mask[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    left, top = (max(-start, 0) for start in first)
    x, y = first[0] + left, first[1] + top
    inside = resized[top : top + max(canvas.shape[0] - y, 0), left : left + max(canvas.shape[1] - x, 0)]
    canvas[y : y + inside.shape[0], x : x + inside.shape[1]] = inside.numpy() > 0.5
