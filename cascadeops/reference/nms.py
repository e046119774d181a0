"""Greedy NMS of one image, one candidate after the other, in float64."""

import torch
from torch import Tensor

from cascadeops.reference.padded_nms import greedy_nms


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return batched_nms(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    scores = scores.double().clamp(min=-1e300)  # a score of -inf marks padding for greedy_nms, but not here
    return greedy_nms(boxes, scores, idxs, iou_threshold, len(boxes))
