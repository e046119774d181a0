"""Which ground truth a box is trained on, and which boxes are trained on at all. Fixed shapes throughout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .boxes import box_iou

NEGATIVE, IGNORED = -1, -2


def match_boxes(
    boxes: Tensor,
    valid: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    positive_iou: float,
    negative_iou: float,
    low_quality_iou: float | None,
) -> Tensor:
    """Index of the ground truth of each box, or NEGATIVE, or IGNORED (Faster R-CNN, section 3.1.2).

    Args:
        boxes: [N, P, 4] and their validity [N, P]; gt_boxes: [N, G, 4], G >= 1, and theirs [N, G].
        positive_iou: a box whose best IoU reaches it is positive.
        negative_iou: a box whose best IoU is below it is negative; between the two it is ignored.
        low_quality_iou: where a ground truth's best IoU over all boxes reaches this, every box with exactly that IoU is
            given to it, whatever the first two rules said; where several claim a box, the last wins. None: not done.

    Returns:
        [N, P] int64; rows that are not valid are IGNORED.
    """
    iou = box_iou(gt_boxes, boxes)  # [N, G, P]
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


@dataclass(frozen=True)
class Samples:
    """Boxes chosen for a loss: positives first, then negatives, then padding."""

    index: Tensor
    """[N, S] rows of the boxes that were matched."""
    gt_index: Tensor
    """[N, S] ground truth of the positives, 0 elsewhere."""
    positive: Tensor
    """[N, S] bool."""
    valid: Tensor
    """[N, S] bool: positive or negative."""


def sample_matches(match: Tensor, num_samples: int, positive_fraction: float) -> Samples:
    """A random subset: at most `positive_fraction` positives, filled up with negatives.

    Args:
        match: [N, P] as `match_boxes` returns it.

    Returns:
        Samples with S = min(num_samples, P) rows an image.
    """
    num_samples = min(num_samples, match.shape[1])
    max_positive = min(int(num_samples * positive_fraction) or 1, match.shape[1])
    positive, negative = match >= 0, match == NEGATIVE
    luck = torch.rand(match.shape, device=match.device)
    lucky_score, lucky = torch.where(positive, luck, -1.0).topk(max_positive, dim=1)
    chosen = torch.zeros_like(positive).scatter(1, lucky, lucky_score >= 0)
    # Halved, because 1 + luck may round to 2: a negative would then pass for a positive, once in some million draws.
    priority = torch.where(chosen, 2 + luck / 2, torch.where(negative, 1 + luck / 2, 0.0))
    priority, index = priority.topk(num_samples, dim=1)
    chosen = priority >= 2
    gt_index = torch.where(chosen, match.gather(1, index), 0)
    return Samples(index, gt_index, chosen, priority >= 1)
