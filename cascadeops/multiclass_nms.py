"""Per-class NMS of every class and image in one call, with a fixed-size result."""

import torch
from torch import Tensor

from cascadeops._arguments import as_float32, check_range, check_shapes


def multiclass_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The best detections of every image after non-maximum suppression within each class.

    Candidates are the (row, class) pairs with score > ``score_threshold``, visited by descending score, equal scores by
    ascending row * C + class. A candidate is dropped when its IoU with a kept one of its class is greater than
    ``iou_threshold``; the visit ends when ``max_detections`` are kept. IoU as in ``padded_nms``. There is no
    synchronisation with the host and no gradient.

    Args:
        boxes: [B, N, 4] (shared by the classes) or [B, N, C * 4] (one per class), (x1, y1, x2, y2) in pixels; any
            floating dtype, read as float32.
        scores: [B, N, C] without the background class; rows of -inf are padding.
        score_threshold: a number; -inf lets everything pass but padding.
        iou_threshold: in [0, 1].
        max_detections: capacity D of the result for each image, at least 0.

    Returns:
        boxes: float32 [B, D, 4], zeros after the last detection.
        scores: float32 [B, D], descending, then -inf.
        labels: int64 [B, D], 0..C-1, then -1.
        index: int64 [B, D], the source row, then -1.
        count: int64 [B], the number of detections.

    Raises:
        RuntimeError: for a wrong shape, dtype or device; on the CPU also for a NaN score or a candidate whose box is
            not finite, which on CUDA is skipped and noted for `raise_device_faults`.

    Source: results as mmdet.models.layers.multiclass_nms with nms_cfg=dict(type="nms").
    """
    boxes, scores = as_float32("multiclass_nms", boxes=boxes, scores=scores)
    return torch.ops.cascadeops.multiclass_nms(boxes, scores, score_threshold, iou_threshold, max_detections)


@torch.library.register_fake("cascadeops::multiclass_nms")
def _(boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int):
    check_shapes("multiclass_nms", scores=(scores, "B N C"), boxes=(boxes, "B N *"))
    torch._check(
        boxes.shape[2] in (4, 4 * scores.shape[2]),
        lambda: f"multiclass_nms: boxes must have shape [B, N, 4] or [B, N, C * 4], got {list(boxes.shape)}",
    )
    check_range("multiclass_nms", "max_detections", max_detections, 0, 2**31 - 1)
    batch = boxes.shape[0]
    integers = [boxes.new_empty(shape, dtype=torch.int64) for shape in ((batch, max_detections),) * 2 + ((batch,),)]
    return (boxes.new_empty(batch, max_detections, 4), scores.new_empty(batch, max_detections), *integers)
