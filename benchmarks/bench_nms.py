"""nms and batched_nms against torchvision's: the RPN's levels, a data set's classes, all boxes against all."""

import pytest
import shapes
import torch

import cascadeops
from cascadeops.reference.nms import batched_nms as reference

IOU = 0.5


@pytest.mark.parametrize("implementation", ["cascadeops", "torchvision", "reference"])
@pytest.mark.parametrize(("count", "groups"), [(1_000, 1), (10_000, 1), (10_000, 5), (10_000, 80), (100_000, 80)])
def bench_nms(measure, device, count, groups, implementation):
    if implementation == "reference" and count > 1_000:
        pytest.skip("takes minutes")
    boxes, scores, idxs = shapes.crowded_boxes(count, groups, device)
    operators = pytest.importorskip("torchvision").ops if implementation == "torchvision" else cascadeops
    if implementation == "reference":
        function = lambda: reference(boxes, scores, idxs, IOU)  # noqa: E731
    elif groups == 1:
        function = lambda: operators.nms(boxes, scores, IOU)  # noqa: E731
    else:
        function = lambda: operators.batched_nms(boxes, scores, idxs, IOU)  # noqa: E731
    expected = set(cascadeops.batched_nms(boxes, scores, idxs, IOU).tolist())

    def check(kept: torch.Tensor):
        # Pairs whose IoU is at the threshold to within rounding may be decided differently by torchvision's float32.
        assert len(set(kept.tolist()) ^ expected) <= (1e-3 * len(expected) if implementation == "torchvision" else 0)

    name = "nms" if groups == 1 else f"batched_nms, {groups} groups"
    measure(f"{name}, {count:,} boxes", implementation, function, check, bytes_moved=28 * count)
