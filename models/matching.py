"""Which boxes are trained on, of those that `cascadeops.match_boxes` matched. Fixed shapes throughout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEGATIVE, IGNORED = -1, -2
"""What `cascadeops.match_boxes` gives a box that has no ground truth."""


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
