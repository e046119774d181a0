"""NMS of one image with a result of the length that the data asks for: torchvision's nms and batched_nms."""

import torch
from torch import Tensor

from cascadeops._arguments import as_float32, as_int64, check_shapes


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression of one image; drop-in for ``torchvision.ops.nms``.

    Rows are visited by descending score, equal scores by ascending row; a row is dropped when its IoU with a kept row
    is greater than ``iou_threshold``. The decision is that of the float64 quotient of the float32 coordinates, on every
    device. Boxes without area (x2 <= x1 or y2 <= y1) have IoU 0 with everything. Memory is O(N).

    The device knows the length of the result first, so on CUDA the host waits for it once. ``padded_nms`` does not
    wait, takes a batch, and is the one for ``torch.compile`` and CUDA graphs. Under ``torch.compile`` this operator
    needs ``torch._dynamo.config.capture_dynamic_output_shape_ops``, as torchvision's does.

    Args:
        boxes: ``[N, 4]``, (x1, y1, x2, y2) in pixels, finite; any floating dtype, read as float32.
        scores: ``[N]``, same dtype rule, not NaN.
        iou_threshold: in [0, 1].

    Returns:
        int64 ``[K]``, the kept rows by descending score.

    Raises:
        RuntimeError: wrong shape, dtype or device, a threshold out of range, a box that is not finite, a NaN score.

    Source: the greedy procedure of Felzenszwalb et al., PAMI 2010, section 5.
    """
    boxes, scores = as_float32("nms", boxes=boxes, scores=scores)
    return torch.ops.cascadeops.nms(boxes, scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """``nms`` within each group of rows; drop-in for ``torchvision.ops.batched_nms``.

    Rows of different groups are not compared at all: no coordinates are moved apart, so nothing is rounded.

    Args:
        boxes, scores, iou_threshold: as ``nms``.
        idxs: integers ``[N]`` of any value, the group (class, level) of each row.

    Returns:
        int64 ``[K]``, the kept rows of all groups by descending score, equal scores by ascending row.

    Raises:
        RuntimeError: as ``nms``.
    """
    boxes, scores = as_float32("batched_nms", boxes=boxes, scores=scores)
    return torch.ops.cascadeops.batched_nms(boxes, scores, as_int64("batched_nms", "idxs", idxs), iou_threshold)


def _some_rows(boxes: Tensor) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(min=0), dtype=torch.int64)


@torch.library.register_fake("cascadeops::nms")
def _(boxes: Tensor, scores: Tensor, iou_threshold: float):
    check_shapes("nms", boxes=(boxes, "N 4"), scores=(scores, "N"))
    return _some_rows(boxes)


@torch.library.register_fake("cascadeops::batched_nms")
def _(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float):
    check_shapes("batched_nms", boxes=(boxes, "N 4"), scores=(scores, "N"), idxs=(idxs, "N"))
    return _some_rows(boxes)
