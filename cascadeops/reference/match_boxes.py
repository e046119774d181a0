"""IoU assignment by the whole matrix of IoUs: [N, G, P] numbers."""

import torch
from torch import Tensor

NEGATIVE, IGNORED = -1, -2


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes [N, P, 4] with others [N, Q, 4]: [N, P, Q]; 0 where both are empty."""
    top_left = torch.maximum(boxes[:, :, None, :2], others[:, None, :, :2])
    bottom_right = torch.minimum(boxes[:, :, None, 2:], others[:, None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    area, other_area = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (boxes, others))
    union = area[:, :, None] + other_area[:, None] - intersection
    return intersection / union.clamp(min=1e-6)


def match_boxes(
    boxes: Tensor,
    valid: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    positive_iou: float,
    negative_iou: float,
    low_quality_iou: float | None = None,
) -> Tensor:
    if gt_boxes.shape[1] == 0 or boxes.shape[1] == 0:
        return torch.where(valid, NEGATIVE, IGNORED)
    iou = box_iou(gt_boxes, boxes)
    iou = torch.where(gt_valid[:, :, None] & valid[:, None], iou, -1.0)
    best_iou, best_gt = iou.max(dim=1)
    match = torch.where(best_iou >= positive_iou, best_gt, IGNORED)
    match = torch.where(best_iou < negative_iou, NEGATIVE, match)
    if low_quality_iou is not None:
        best_of_gt = iou.amax(dim=2, keepdim=True)
        claimed = (iou == best_of_gt) & (best_of_gt >= low_quality_iou)
        rank = torch.arange(1, iou.shape[1] + 1, device=iou.device)[:, None]
        last_claim = (claimed * rank).amax(dim=1) - 1
        match = torch.where(last_claim >= 0, last_claim, match)
    return torch.where(valid, match, IGNORED)
