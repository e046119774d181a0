"""roi_align against torchvision's: 256 boxes on one map of 100 x 168, as a detector without a pyramid has them."""

import pytest
import shapes
import torch

import cascadeops

COUNT, SIZE, STRIDE = 256, 14, 8


@pytest.mark.parametrize("implementation", ["cascadeops", "torchvision"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def bench_roi_align(measure, device, direction, implementation):
    ops = cascadeops if implementation == "cascadeops" else pytest.importorskip("torchvision").ops
    level = shapes.pyramid(1, device, channels_last=False)[1].requires_grad_(direction == "backward")
    boxes = shapes.rois(COUNT, 1, device)
    pool = lambda: ops.roi_align(level, boxes, SIZE, 1 / STRIDE, 2, True)  # noqa: E731
    expected = cascadeops.roi_align(level, boxes, SIZE, 1 / STRIDE, 2, True)
    function, wanted = pool, expected.detach()
    if direction == "backward":
        pooled, grad = pool(), torch.ones_like(expected)
        function = lambda: torch.autograd.grad(pooled, level, grad, retain_graph=True)[0]  # noqa: E731
        wanted = torch.autograd.grad(expected, level, grad)[0]
    check = lambda result: torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)  # noqa: E731
    bytes_moved = level.nbytes + expected.nbytes
    measure(f"roi_align, {direction}, 256 x 14 x 14 x 256, NCHW", implementation, function, check, bytes_moved)
