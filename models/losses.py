"""Losses over fixed-size samples: rows that do not count have weight 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import number_of_ranks, sum_over_ranks


def normaliser(count: Tensor) -> Tensor:
    """What a sum of losses is divided by: how many there are, at least 1.

    Where several processes train together it is the mean of their counts, so that the mean of their losses is the loss
    of one process with all their images. (mmdetection divides by each process's own count.)
    """
    return sum_over_ranks(count).clamp(min=1) / number_of_ranks()


def box_loss(deltas: Tensor, targets: Tensor, positive: Tensor, num_samples: Tensor, beta: float) -> Tensor:
    """Smooth L1 (Fast R-CNN, equation 3) over the positives [R], summed over rows and coordinates / samples.

    Args:
        deltas, targets: [R, 4]; positive: [R] bool; num_samples: scalar; beta: where the square meets the line.
    """
    # where() before the loss, not after: a padding row's target may be infinite, and 0 * inf is not 0 in the gradient.
    targets = torch.where(positive[:, None], targets, deltas.detach().float())
    return F.smooth_l1_loss(deltas.float(), targets, beta=beta, reduction="sum") / num_samples


def objectness_loss(logits: Tensor, positive: Tensor, valid: Tensor, num_samples: Tensor) -> Tensor:
    """Binary cross entropy over the valid rows [R] / samples."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), positive.float(), reduction="none")
    return (loss * valid).sum() / num_samples


def class_loss(logits: Tensor, labels: Tensor, valid: Tensor, num_samples: Tensor) -> Tensor:
    """Softmax cross entropy of logits [R, num_classes + 1] over the valid rows / samples."""
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    return (loss * valid).sum() / num_samples


def mask_loss(mask_logits: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """Binary cross entropy of the own class's mask (Mask R-CNN, section 3), mean over positives and pixels.

    Args:
        mask_logits: [R, M, M]; targets: [R, M, M] in {0, 1}; positive: [R] bool.
    """
    loss = F.binary_cross_entropy_with_logits(mask_logits, targets.float(), reduction="none").mean(dim=(1, 2))
    return (loss * positive).sum() / normaliser(positive.sum())


def semantic_loss(logits: Tensor, labels: Tensor, mean: str) -> Tensor:
    """Pixel-wise softmax cross entropy; 255 is ignored.

    Args:
        logits: [N, K, H, W]; labels: [N, H, W] uint8; mean: "valid" over pixels that count, "all" over every pixel.
    """
    labels = labels.long()
    loss = F.cross_entropy(logits.float(), labels, ignore_index=255, reduction="sum")
    return loss / (labels.numel() if mean == "all" else normaliser((labels != 255).sum()))


def image_label_loss(logits: Tensor, gt_labels: Tensor, gt_valid: Tensor) -> Tensor:
    """Multi-label cross entropy of logits [N, num_classes]: which classes the image holds (SCNet, section 3.3)."""
    present = torch.zeros_like(logits, dtype=torch.float32)
    present = present.scatter_reduce(1, gt_labels.clamp(min=0), gt_valid.float(), "amax")
    return F.binary_cross_entropy_with_logits(logits.float(), present)
