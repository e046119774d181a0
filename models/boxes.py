"""Box arithmetic. Boxes are (x1, y1, x2, y2) in pixels, width = x2 - x1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arithmetic import MMDETECTION, Arithmetic

MAX_LOG_SCALE = abs(math.log(16 / 1000))
"""A box grows or shrinks by at most 1000 / 16 in one regression (Fast R-CNN's code; kept by all its successors)."""
LAST_PIXEL = (0.0, 0.0, 1.0, 1.0)
"""How much further than the last pixel's coordinates an inclusive box ends."""


def constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """A tensor [len(values)] of the other's dtype, filled where it is: a copy from the host would wait for the GPU, and
    cannot be captured in a graph."""
    return torch.cat([like.new_full((1,), value) for value in values])


def encode_boxes(boxes: Tensor, gt_boxes: Tensor, stds: tuple[float, ...]) -> Tensor:
    """Deltas (dx, dy, dw, dh) from `boxes` [..., 4] to `gt_boxes` [..., 4] (R-CNN, appendix C), divided by `stds`."""
    size = boxes[..., 2:] - boxes[..., :2]
    gt_size = gt_boxes[..., 2:] - gt_boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5
    gt_centre = (gt_boxes[..., :2] + gt_boxes[..., 2:]) * 0.5
    deltas = torch.cat([(gt_centre - centre) / size, torch.log(gt_size / size)], dim=-1)
    return deltas / constant(stds, deltas)


def decode_boxes(
    boxes: Tensor,
    deltas: Tensor,
    stds: tuple[float, ...],
    image_sizes: Tensor,
    arithmetic: Arithmetic = MMDETECTION,
) -> Tensor:
    """Inverse of `encode_boxes`, clipped to the image.

    Args:
        boxes: [N, P, 4]; deltas: [N, P, 4], normalised by `stds`; image_sizes: [N, 2] (height, width) in pixels.
    """
    deltas = deltas.float() * constant(stds, boxes)
    size = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5 + size * deltas[..., :2]
    least = -MAX_LOG_SCALE if arithmetic.limits_shrinking else None
    half = size * torch.exp(deltas[..., 2:].clamp(least, MAX_LOG_SCALE)) * 0.5
    return clip_boxes(torch.cat([centre - half, centre + half], dim=-1), image_sizes, arithmetic)


def decode_class_boxes(
    boxes: Tensor,
    deltas: Tensor,
    stds: tuple[float, ...],
    image_sizes: Tensor,
    arithmetic: Arithmetic = MMDETECTION,
) -> Tensor:
    """`decode_boxes` of a head with one box a class: boxes [N, P, 4], deltas [N * P, K * 4] -> [N, P, K * 4]."""
    num_images, num_boxes, _ = boxes.shape
    starts = boxes.repeat_interleave(deltas.shape[1] // 4, dim=1)
    decoded = decode_boxes(starts, deltas.view(starts.shape), stds, image_sizes, arithmetic)
    return decoded.view(num_images, num_boxes, deltas.shape[1])


def clip_boxes(boxes: Tensor, image_sizes: Tensor, arithmetic: Arithmetic = MMDETECTION) -> Tensor:
    """Clips boxes [N, P, 4] to [0, width] x [0, height] of image_sizes [N, 2] (height, width)."""
    limit = image_sizes.flip(-1).repeat(1, 2)[:, None].to(boxes.dtype)
    if arithmetic.inclusive:  # the first and the last pixel of a box are clipped to those of the image
        last_pixel = constant(LAST_PIXEL, boxes)
        return torch.minimum(torch.maximum(boxes, last_pixel), limit - last_pixel.flip(-1))
    return torch.minimum(boxes.clamp(min=0), limit)


def smaller_than(boxes: Tensor, least: float) -> Tensor:
    """Which boxes [..., 4] are narrower or lower than so many pixels: [...]"""
    return (boxes[..., 2:] - boxes[..., :2]).amin(dim=-1) < least


def resize_boxes(boxes: Tensor, factors: Tensor, arithmetic: Arithmetic = MMDETECTION) -> Tensor:
    """Boxes [..., 4] in an image that is resized by factors [..., 4] (x, y, x, y)."""
    if arithmetic.inclusive:
        last_pixel = constant(LAST_PIXEL, boxes)
        return (boxes - last_pixel) * factors + last_pixel
    return boxes * factors


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes [N, P, 4] with others [N, Q, 4]: [N, P, Q]; 0 where both are empty."""
    top_left = torch.maximum(boxes[:, :, None, :2], others[:, None, :, :2])
    bottom_right = torch.minimum(boxes[:, :, None, 2:], others[:, None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    union = box_area(boxes)[:, :, None] + box_area(others)[:, None] - intersection
    return intersection / union.clamp(min=1e-6)


def box_area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def boxes_to_rois(boxes: Tensor, valid: Tensor) -> Tensor:
    """[N, P, 4] and validity [N, P] -> rois [N * P, 5] (batch index, x1, y1, x2, y2); padding rows get index -1."""
    index = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None].expand(valid.shape)
    index = torch.where(valid, index, -1.0)
    return torch.cat([index[..., None], boxes], dim=-1).flatten(0, 1)
