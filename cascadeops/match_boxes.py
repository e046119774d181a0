"""Which ground truth each box is trained on, without a matrix of IoUs."""

import torch
from torch import Tensor

from cascadeops._arguments import as_float32, check_shapes, check_tensors


def match_boxes(
    boxes: Tensor,  # [N, P, 4]
    valid: Tensor,  # bool [N, P]
    gt_boxes: Tensor,  # [N, G, 4]
    gt_valid: Tensor,  # bool [N, G]
    positive_iou: float,
    negative_iou: float,
    low_quality_iou: float | None = None,
) -> Tensor:
    """Index of the ground truth of each box, or -1 (negative), or -2 (ignored), by intersection over union.

    IoUs are float32 and rounded as tensor operations round them, on every device, so that two boxes with the same best
    IoU tie here exactly where they tie there. Memory is O(P + G): 268,569 anchors and 500 ground truths need 1 MB,
    where the matrix has 537 MB. There is no synchronisation with the host and no gradient.

    Args:
        boxes: ``[N, P, 4]``, (x1, y1, x2, y2) in pixels; any floating dtype, read as float32. A batch of one image's
            anchors, ``anchors.expand(N, -1, -1)``, is not copied.
        valid: bool ``[N, P]``; other rows are ignored, and their boxes not looked at.
        gt_boxes: ``[N, G, 4]``, same rules; G may be 0.
        gt_valid: bool ``[N, G]``; other rows are padding.
        positive_iou: in [0, 1]; a box whose best IoU reaches it is positive: it gets the ground truth of that IoU, of
            several the first.
        negative_iou: in [0, positive_iou]; a box whose best IoU is below it is negative, and so is every valid box of
            an image without ground truth. Between the two a box is ignored.
        low_quality_iou: in [0, 1]; where a ground truth's best IoU over all boxes reaches this, every box with exactly
            that IoU is given to it, whatever the first two rules said; where several claim a box, the last wins. None:
            not done.

    Returns:
        int64 ``[N, P]``.

    Raises:
        RuntimeError: wrong shape, dtype or device, thresholds out of range; on the CPU also for a valid row whose box
            is not finite, which on CUDA has IoU 0 with everything and is noted for `raise_device_faults`.

    Source: Ren et al., "Faster R-CNN", NIPS 2015, section 3.1.2; results as mmdetection 3's ``MaxIoUAssigner``.
    """
    boxes, gt_boxes = as_float32("match_boxes", boxes=boxes, gt_boxes=gt_boxes)
    check_tensors("match_boxes", valid=valid, gt_valid=gt_valid)
    return torch.ops.cascadeops.match_boxes(
        boxes, valid, gt_boxes, gt_valid, positive_iou, negative_iou, low_quality_iou
    )


@torch.library.register_fake("cascadeops::match_boxes")
def _(boxes, valid, gt_boxes, gt_valid, positive_iou, negative_iou, low_quality_iou):
    check_shapes(
        "match_boxes",
        boxes=(boxes, "N P 4"),
        valid=(valid, "N P"),
        gt_boxes=(gt_boxes, "N G 4"),
        gt_valid=(gt_valid, "N G"),
    )
    return boxes.new_empty(boxes.shape[:2], dtype=torch.int64)
