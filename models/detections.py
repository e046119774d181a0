"""What a detector returns, and the steps between its last heads and that. Fixed shapes throughout."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

import cascadeops

from .arithmetic import ARITHMETICS
from .boxes import smaller_than


class Detections(NamedTuple):
    """Detections of a batch, best first; rows from count on are padding."""

    boxes: Tensor
    """[N, D, 4] pixels of the network's input."""
    scores: Tensor
    """[N, D]; -inf in padding rows."""
    labels: Tensor
    """[N, D] int64; -1 in padding rows."""
    mask_probs: Tensor | None
    """[N, D, 28, 28]: the mask inside the box; None from a detector without masks."""
    count: Tensor
    """[N] int64."""


def best_detections(
    boxes: Tensor, class_logits: Tensor, valid: Tensor, config
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best boxes of each image after NMS within each class.

    Args:
        boxes: [N, P, 4], or [N, P, K * 4] with one box a class.
        class_logits: [N * P, K + 1], background last.
        valid: [N, P] bool.
        config: a detector's; `score_threshold`, `nms_iou`, `max_detections` and `arithmetic` are read.

    Returns:
        boxes [N, D, 4], scores [N, D], labels [N, D], count [N]; padding as in `Detections`.
    """
    scores = class_logits.softmax(dim=-1)[:, :-1].unflatten(0, valid.shape) * valid[..., None]
    least = ARITHMETICS[config.arithmetic].least_sizes[1]
    if least > 0:
        scores = scores.masked_fill(smaller_than(boxes.unflatten(-1, (-1, 4)), least), 0.0)
    boxes, scores, labels, _, count = cascadeops.multiclass_nms(
        boxes, scores, config.score_threshold, config.nms_iou, config.max_detections
    )
    return boxes, scores, labels, count


def mask_probabilities(mask_logits: list[Tensor], valid: Tensor, max_detections: int) -> Tensor:
    """The mean over the mask heads.

    Args:
        mask_logits: one [N * P, M, M] a mask head.
        valid: [N, P] bool, P <= max_detections; 0 elsewhere.

    Returns:
        [N, max_detections, M, M]
    """
    probs = sum(logits.sigmoid() for logits in mask_logits) / len(mask_logits)
    probs = probs.unflatten(0, valid.shape) * valid[..., None, None]
    return F.pad(probs, (0, 0, 0, 0, 0, max_detections - valid.shape[1]))
