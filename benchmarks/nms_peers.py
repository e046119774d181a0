"""batched_nms of other libraries by one signature: (boxes, scores, idxs, iou_threshold) -> kept rows."""

from collections.abc import Callable

import pytest

PEERS = ["torchvision", "mmcv", "detectron2"]


def batched_nms_of(library: str) -> Callable:
    """Skips the benchmark where the library is not installed."""
    if library == "torchvision":
        return pytest.importorskip("torchvision").ops.batched_nms
    if library == "detectron2":
        return pytest.importorskip("detectron2.layers").batched_nms
    mmcv = pytest.importorskip("mmcv.ops")

    def batched_nms(boxes, scores, idxs, iou_threshold):
        return mmcv.batched_nms(boxes, scores, idxs, {"type": "nms", "iou_threshold": iou_threshold})[1]

    return batched_nms
