"""Greedy non-maximum suppression, one candidate after the other, in float64."""

import torch
from torch import Tensor


def iou_with(box: Tensor, others: Tensor) -> Tensor:
    """IoU of one box [4] with others [K, 4]; 0 where they share no area, so also for empty and inverted boxes."""
    x1, y1 = torch.maximum(box[0], others[:, 0]), torch.maximum(box[1], others[:, 1])
    x2, y2 = torch.minimum(box[2], others[:, 2]), torch.minimum(box[3], others[:, 3])
    intersection = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)
    area = (box[2] - box[0]) * (box[3] - box[1])
    areas = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    return torch.where(intersection > 0, intersection / (area + areas - intersection), 0)


def greedy_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_output: int) -> Tensor:
    """Kept rows of one image, best score first: boxes [N, 4], scores [N], groups [N] -> int64 [K], K <= max_output."""
    boxes = boxes.double()
    order = scores.sort(descending=True, stable=True).indices
    kept: list[int] = []
    for row in order.tolist():
        if scores[row] == -torch.inf or len(kept) == max_output:
            break
        rivals = [other for other in kept if groups[other] == groups[row]]
        if not (iou_with(boxes[row], boxes[rivals]) > iou_threshold).any():
            kept.append(row)
    return torch.tensor(kept, dtype=torch.int64)


def padded_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    groups = torch.zeros_like(scores, dtype=torch.int64) if groups is None else groups
    index = torch.full((len(boxes), max_output), -1)
    count = torch.zeros(len(boxes), dtype=torch.int64)
    for image in range(len(boxes)):
        kept = greedy_nms(boxes[image], scores[image], groups[image], iou_threshold, max_output)
        index[image, : len(kept)] = kept
        count[image] = len(kept)
    return index, count
