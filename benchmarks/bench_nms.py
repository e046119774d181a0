"""nms and batched_nms against other libraries': all boxes against all, the RPN's levels, a data set's classes."""

import pytest
import shapes
import torch
from nms_peers import PEERS, batched_nms_of

import cascadeops
from cascadeops.reference import nms as reference

IOU = 0.5
COUNTS = [1_000, 10_000, 100_000]


def skip_hopeless(implementation, count, groups=1):
    if implementation == "reference" and (count > 1_000 or groups > 5):
        pytest.skip("takes minutes")


def checker(expected: torch.Tensor, implementation: str):
    rows = set(expected.tolist())

    def check(kept: torch.Tensor):
        # Pairs whose IoU is at the threshold to within rounding may be decided differently by a peer's float32.
        assert len(set(kept.tolist()) ^ rows) <= (1e-3 * len(rows) if implementation in PEERS else 0)

    return check


@pytest.mark.parametrize("implementation", ["cascadeops", "torchvision", "mmcv", "reference"])
@pytest.mark.parametrize("count", COUNTS)
def bench_nms(measure, device, count, implementation):
    skip_hopeless(implementation, count)
    boxes, scores, _ = shapes.crowded_boxes(count, 1, device)
    if implementation == "torchvision":
        function = pytest.importorskip("torchvision").ops.nms
    elif implementation == "mmcv":
        mmcv_nms = pytest.importorskip("mmcv.ops").nms
        function = lambda *arguments: mmcv_nms(*arguments)[1]  # noqa: E731
    else:
        function = cascadeops.nms if implementation == "cascadeops" else reference.nms
    check = checker(cascadeops.nms(boxes, scores, IOU), implementation)
    workload = f"nms, {count:,} boxes"
    measure(workload, implementation, lambda: function(boxes, scores, IOU), check, bytes_moved=20 * count)


@pytest.mark.parametrize("implementation", ["cascadeops", *PEERS, "reference"])
@pytest.mark.parametrize("groups", [5, 80])
@pytest.mark.parametrize("count", COUNTS)
def bench_batched_nms(measure, device, count, groups, implementation):
    skip_hopeless(implementation, count, groups)
    boxes, scores, idxs = shapes.crowded_boxes(count, groups, device)
    ours = {"cascadeops": cascadeops.batched_nms, "reference": reference.batched_nms}
    function = ours.get(implementation) or batched_nms_of(implementation)
    check = checker(cascadeops.batched_nms(boxes, scores, idxs, IOU), implementation)
    workload = f"batched_nms, {count:,} boxes, {groups} groups"
    measure(workload, implementation, lambda: function(boxes, scores, idxs, IOU), check, bytes_moved=28 * count)
