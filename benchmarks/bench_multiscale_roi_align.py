"""multiscale_roi_align against torchvision and detectron2: 1000 proposals of one image, 7 x 7 x 256 each."""

import pytest
import shapes
import torch

import cascadeops
from cascadeops.reference.multiscale_roi_align import multiscale_roi_align as reference

COUNT, SIZE = 1000, 7
SCALE_NAMES = [str(stride) for stride in shapes.STRIDES]
LAYOUTS = {"channels-last": True, "NCHW": False}


def pool_with(implementation: str, ratio: int):
    """A function (maps, rois) -> [K, C, 7, 7] that samples as torchvision does."""
    if implementation in ("cascadeops", "reference"):
        function = cascadeops.multiscale_roi_align if implementation == "cascadeops" else reference
        return lambda maps, rois: function(
            maps, rois, SIZE, shapes.STRIDES, ratio, aligned=False, level_rule="torchvision"
        )
    if implementation == "detectron2":
        structures = pytest.importorskip("detectron2.structures")
        poolers = pytest.importorskip("detectron2.modeling.poolers")
        pooler = poolers.ROIPooler(SIZE, [1 / stride for stride in shapes.STRIDES], ratio, "ROIAlign")
        return lambda maps, rois: pooler(maps, [structures.Boxes(rois[:, 1:])])
    module = pytest.importorskip("torchvision").ops.MultiScaleRoIAlign(SCALE_NAMES, SIZE, ratio)

    def pool(maps, rois):
        return module(dict(zip(SCALE_NAMES, maps, strict=True)), [rois[:, 1:]], [shapes.IMAGE_SIZE])

    return pool


def workload(device, dtype, layout, implementation):
    if implementation != "cascadeops" and (dtype, layout) != (torch.float32, "NCHW"):
        pytest.skip("torchvision's kernel, also detectron2's, has no bfloat16, and copies channels-last maps to NCHW")
    maps = shapes.pyramid(1, device, dtype, channels_last=LAYOUTS[layout])
    return maps, shapes.rois(COUNT, 1, device)


def cases(function):
    """Every implementation, way of sampling, dtype and layout."""
    for mark in (
        pytest.mark.parametrize("implementation", ["cascadeops", "torchvision", "detectron2"]),
        pytest.mark.parametrize("layout", LAYOUTS),
        pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]),
        pytest.mark.parametrize("ratio", [0, 2], ids=["adaptive", "fixed2"]),
    ):
        function = mark(function)
    return function


def name_of(direction: str, ratio: int) -> str:
    return f"multiscale_roi_align, {direction}, 1000 x 7 x 7 x 256, {'2 x 2 samples' if ratio else 'adaptive'}"


def label(implementation: str, dtype: torch.dtype, layout: str) -> str:
    """What differs from float32, and for ours from channels-last maps, is added to the name."""
    kind = [str(dtype).removeprefix("torch.")] if dtype != torch.float32 else []
    kind += [layout] if implementation == "cascadeops" and layout != "channels-last" else []
    return " ".join([implementation, *kind])


@cases
def bench_forward(measure, device, ratio, dtype, layout, implementation):
    maps, rois = workload(device, dtype, layout, implementation)
    pool = pool_with(implementation, ratio)
    few = slice(None, None, 50)
    expected = pool_with("reference", ratio)([level.float() for level in maps], rois[few])

    def check(pooled):
        torch.testing.assert_close(pooled[few].float(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-2)

    bytes_moved = sum(level.nbytes for level in maps) + COUNT * SIZE * SIZE * shapes.CHANNELS * maps[0].element_size()
    function = lambda: pool(maps, rois)  # noqa: E731
    measure(name_of("forward", ratio), label(implementation, dtype, layout), function, check, bytes_moved)


@cases
def bench_backward(measure, device, ratio, dtype, layout, implementation):
    maps, rois = workload(device, dtype, layout, implementation)
    leaves = [level.requires_grad_() for level in maps]
    pooled = pool_with(implementation, ratio)(leaves, rois)
    grad = torch.ones_like(pooled)

    def check(grads):
        # Weights of a bin sum to 1, as every sample lies inside the image: so the gradient sums to the bins.
        total = sum(level.sum(dtype=torch.float64) for level in grads).item()
        assert total == pytest.approx(grad.numel(), rel=1e-4 if dtype == torch.float32 else 1e-2)

    bytes_moved = sum(level.nbytes for level in maps) + grad.nbytes
    function = lambda: torch.autograd.grad(pooled, leaves, grad, retain_graph=True)  # noqa: E731
    measure(name_of("backward", ratio), label(implementation, dtype, layout), function, check, bytes_moved)
