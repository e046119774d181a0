"""roi_align against torchvision and mmcv: 256 boxes on one map of 100 x 168, as a detector without a pyramid has."""

import pytest
import shapes
import torch

import cascadeops
from cascadeops.reference.roi_align import roi_align as reference

COUNT, SIZE, SCALE = 256, 14, 1 / 8
LAYOUTS = {"channels-last": True, "NCHW": False}
CASES = [("cascadeops", dtype, layout) for dtype in (torch.float32, torch.bfloat16) for layout in LAYOUTS]
CASES += [(peer, torch.float32, "NCHW") for peer in ("torchvision", "mmcv", "reference")]


def pool_with(implementation: str, ratio: int):
    """A function (map, rois) -> [K, C, 14, 14]; boxes are shifted by half a cell."""
    if implementation == "mmcv":
        pool = pytest.importorskip("mmcv.ops").roi_align
        return lambda level, rois: pool(level, rois, SIZE, SCALE, ratio, "avg", True)
    if implementation == "reference":
        return lambda level, rois: reference(level, rois, (SIZE, SIZE), SCALE, ratio, True)
    ops = cascadeops if implementation == "cascadeops" else pytest.importorskip("torchvision").ops
    return lambda level, rois: ops.roi_align(level, rois, SIZE, SCALE, ratio, True)


def workload(device, dtype, layout):
    level = shapes.pyramid(1, device, dtype, channels_last=LAYOUTS[layout])[1]
    return level, shapes.rois(COUNT, 1, device)


def measured(direction: str, ratio: int, implementation: str, dtype: torch.dtype, layout: str) -> tuple[str, str]:
    sampling = "2 x 2 samples" if ratio else "adaptive"
    name = f"roi_align, {direction}, 256 x 14 x 14 x 256, {sampling}"
    kind = [str(dtype).removeprefix("torch.")] if dtype != torch.float32 else []  # ours: float32, channels-last
    kind += [layout] if implementation == "cascadeops" and layout != "channels-last" else []
    return name, " ".join([implementation, *kind])


@pytest.mark.parametrize(("implementation", "dtype", "layout"), CASES)
@pytest.mark.parametrize("ratio", [0, 2], ids=["adaptive", "fixed2"])
def bench_forward(measure, device, ratio, implementation, dtype, layout):
    level, rois = workload(device, dtype, layout)
    pool = pool_with(implementation, ratio)
    few = slice(None, None, 16)
    expected = pool_with("reference", ratio)(level.float(), rois[few])

    def check(pooled):
        torch.testing.assert_close(pooled[few].float(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-2)

    bytes_moved = level.nbytes + COUNT * SIZE * SIZE * shapes.CHANNELS * level.element_size()
    name = measured("forward", ratio, implementation, dtype, layout)
    measure(*name, lambda: pool(level, rois), check, bytes_moved)


@pytest.mark.parametrize(("implementation", "dtype", "layout"), CASES)
@pytest.mark.parametrize("ratio", [0, 2], ids=["adaptive", "fixed2"])
def bench_backward(measure, device, ratio, implementation, dtype, layout):
    if implementation == "reference":
        pytest.skip("takes many gigabytes")
    level, rois = workload(device, dtype, layout)
    level.requires_grad_()
    pooled = pool_with(implementation, ratio)(level, rois)
    grad = torch.ones_like(pooled)

    def check(result):
        # Weights of a bin sum to 1, as every sample lies inside the image: so the gradient sums to the bins.
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        assert result.sum(dtype=torch.float64).item() == pytest.approx(grad.numel(), rel=tolerance)

    name = measured("backward", ratio, implementation, dtype, layout)
    function = lambda: torch.autograd.grad(pooled, level, grad, retain_graph=True)[0]  # noqa: E731
    measure(*name, function, check, level.nbytes + grad.nbytes)
