"""NMS for a whole batch, with a fixed-size result."""

import torch
from torch import Tensor

from cascadeops._arguments import as_float32, as_int64, check_range, check_shapes


def padded_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression of every image of a batch, each group (class, pyramid level) on its own.

    Rows are visited by descending score, equal scores by ascending row; a row is dropped when its IoU with a kept row
    of its group is greater than ``iou_threshold``. The decision is that of the float64 quotient of the float32
    coordinates, on every device. Boxes without area (x2 <= x1 or y2 <= y1) have IoU 0 with everything. There is no
    synchronisation with the host and no gradient.

    Args:
        boxes: [B, N, 4], (x1, y1, x2, y2) in pixels, finite; any floating dtype, read as float32.
        scores: [B, N], same dtype rule; -inf marks a padding row, whose box is not looked at.
        groups: integers [B, N] of any value, or None for a single group.
        iou_threshold: in [0, 1].
        max_output: capacity of the result for each image, at least 0.

    Returns:
        index: int64 [B, max_output], kept rows by descending score, then -1.
        count: int64 [B], the number of kept rows.

    Raises:
        RuntimeError: for a wrong shape, dtype or device; on the CPU also for a NaN score or a box that is not finite
            (on CUDA such a row is skipped like padding and noted for `raise_device_faults`).

    Source: the greedy procedure of Felzenszwalb et al., PAMI 2010, section 5; results as torchvision.ops.batched_nms.
    """
    boxes, scores = as_float32("padded_nms", boxes=boxes, scores=scores)
    groups = None if groups is None else as_int64("padded_nms", "groups", groups)
    return torch.ops.cascadeops.padded_nms(boxes, scores, groups, iou_threshold, max_output)


@torch.library.register_fake("cascadeops::padded_nms")
def _(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float, max_output: int):
    check_shapes("padded_nms", boxes=(boxes, "B N 4"), scores=(scores, "B N"), groups=(groups, "B N"))
    check_range("padded_nms", "max_output", max_output, 0, 2**31 - 1)
    batch = boxes.shape[0]
    return boxes.new_empty(batch, max_output, dtype=torch.int64), boxes.new_empty(batch, dtype=torch.int64)
