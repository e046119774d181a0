"""The tail of a region proposal network, one tensor operation after the other."""

import math

import torch
from torch import Tensor

from cascadeops.reference.padded_nms import padded_nms

MAX_LOG_SCALE = abs(math.log(16 / 1000))


def decode_boxes(anchors: Tensor, deltas: Tensor, stds: tuple[float, ...], image_sizes: Tensor) -> Tensor:
    """Anchors [N, K, 4] moved and scaled by deltas [N, K, 4], clipped to image_sizes [N, 2] (height, width)."""
    deltas = deltas * deltas.new_tensor(stds)
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) * 0.5 + size * deltas[..., :2]
    scale = deltas[..., 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).double().exp().to(deltas.dtype)
    half = size * scale * 0.5
    limit = image_sizes.flip(-1).repeat(1, 2)[:, None].to(anchors.dtype)
    return torch.minimum(torch.cat([centre - half, centre + half], dim=-1).clamp(min=0), limit)


def box_proposals(
    logits: list[Tensor],
    deltas: list[Tensor],
    anchors: list[Tensor],
    image_sizes: Tensor,
    top_k: int,
    max_proposals: int,
    iou_threshold: float,
    stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
) -> tuple[Tensor, Tensor, Tensor]:
    boxes, order, levels = [], [], []
    for level, (level_logits, level_deltas, level_anchors) in enumerate(zip(logits, deltas, anchors, strict=True)):
        top = level_logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        chosen = level_deltas.gather(1, top[..., None].expand(-1, -1, 4))
        boxes.append(decode_boxes(level_anchors[top], chosen, stds, image_sizes))
        order.append(level_logits.gather(1, top))
        levels.append(torch.full_like(top, level))
    boxes, order, levels = torch.cat(boxes, 1), torch.cat(order, 1), torch.cat(levels, 1)
    scores = order.double().sigmoid().to(order.dtype)
    not_empty = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
    # A logit of -inf is the worst, but no padding: -inf is that of padded_nms.
    order = torch.where(not_empty, order.double().clamp(min=-1e300), -torch.inf)
    capacity = min(max_proposals, boxes.shape[1])
    index, count = padded_nms(boxes, order, levels, iou_threshold, capacity)
    valid, index = index >= 0, index.clamp(min=0)
    boxes = torch.where(valid[..., None], boxes.gather(1, index[..., None].expand(-1, -1, 4)), 0)
    return boxes, torch.where(valid, scores.gather(1, index), -torch.inf), count
