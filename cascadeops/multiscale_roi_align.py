"""RoIAlign over a feature pyramid in one operator: level choice, sampling, addition of context, and the gradient."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cascadeops._arguments import as_list, check_range, check_shapes, check_tensors, height_and_width

_EPSILON_INSIDE_LOG = {"mmdet": True, "torchvision": False}


def multiscale_roi_align(
    features: Sequence[Tensor],  # L maps [N, C, H_l, W_l], finest first
    rois: Tensor,  # [K, 5] (batch index, x1, y1, x2, y2)
    output_size: int | tuple[int, int],
    strides: Sequence[float],
    sampling_ratio: int = 0,
    aligned: bool = True,
    finest_size: float = 56.0,
    level_rule: str = "mmdet",
    *,
    extra: Tensor | None = None,  # [N, C, H_e, W_e]
    extra_stride: float = 1.0,
    extra_subdivision: int = 1,
    image_vector: Tensor | None = None,  # [N, C] or [N, C, 1, 1]
    count: Tensor | None = None,  # [] or [1] int64
) -> Tensor:
    """Pools each RoI from the pyramid level that fits its size, by RoIAlign.

    A RoI is cut into ``output_size`` bins. The value of a bin is the mean of bilinear samples on a regular grid inside
    it. A cell's value sits at its centre; a sample less than one cell outside the map takes the border's value, one
    further out counts as 0. On request a second map, pooled alike, and a vector of the RoI's image are added in the
    same pass; half types are then rounded once. Differentiable in ``features``, ``extra`` and ``image_vector``;
    ``rois`` get no gradient. The gradient has the features' dtype and is the same in every run, on the CPU for any
    number of threads and on CUDA.

    Args:
        features: 1 to 8 maps ``[N, C, H_l, W_l]``, finest first; float32, float16, bfloat16 or float64, all alike.
            Channels-last maps are the fast case; others are read where they are, without a copy of the whole map.
        rois: ``[K, 5]`` float32, (batch index, x1, y1, x2, y2) in image pixels. A batch index of -1 marks a padding
            row: its output is 0 and it adds no gradient. A reversed box (x2 < x1 or y2 < y1) has no samples.
        output_size: bins per RoI, (height, width) or one number for both.
        strides: image pixels per cell of each level.
        sampling_ratio: samples per bin along each axis; 0 (or less) takes as many as the bin has cells, rounded up.
            More than 2**24 count as 2**24, which is all that float32 tells apart.
        aligned: True shifts by half a cell, so that pixel (0, 0) covers [0, 1) in image coordinates. False is the first
            RoIAlign: no shift, and boxes are at least one cell wide and high.
        finest_size: RoIs smaller than twice this many pixels, as the square root of their area, use the finest level.
        level_rule: where the 1e-6 stands that keeps exact powers of two on the coarser level. ``"mmdet"``:
            floor(log2(size / finest_size + 1e-6)); ``"torchvision"``: floor(log2(size / finest_size) + 1e-6); clamped
            to the levels there are.
        extra: a map that every RoI reads besides its level, ``[N, C, H_e, W_e]``, dtype of the features: HTC and SCNet
            add pooled semantic features.
        extra_stride: image pixels per cell of ``extra``.
        extra_subdivision: the pooling of ``extra`` has so many times finer bins along each axis, with samples of their
            own, whose mean is taken: 2 is pooling at twice ``output_size``, then 2 x 2 average pooling.
        image_vector: a vector per image, added to all bins of the image's RoIs: SCNet adds its global context.
        count: how many rows of ``rois`` count, on their device. The rows from there on are not looked at, and give 0.

    Returns:
        ``[K, C, height, width]``, dtype of the features; channels-last in memory if the channels of ``features[0]`` are
        adjacent in memory.

    Raises:
        ValueError: unknown ``level_rule``.
        TypeError: an argument of another type.
        RuntimeError: wrong shape, dtype or device. On the CPU also for a ``count`` outside ``[0, K]``, a batch index
            outside ``[-1, N)`` or a coordinate that is not finite; on CUDA, where looking would stall the device,
            ``count`` is clamped, and such a row gives 0 and is noted for `raise_device_faults`.

    Source: He et al., "Mask R-CNN", ICCV 2017, section 3 (RoIAlign); Lin et al., "Feature Pyramid Networks for Object
    Detection", CVPR 2017, equation 1 (level choice); Chen et al., "Hybrid Task Cascade", CVPR 2019, section 3.2, and Vu
    et al., "SCNet", AAAI 2021, section 3 (the additions).
    """
    if level_rule not in _EPSILON_INSIDE_LOG:
        raise ValueError(f'multiscale_roi_align: level_rule must be "mmdet" or "torchvision", got {level_rule!r}')
    op = "multiscale_roi_align"
    maps, strides = as_list(op, "features", features, Tensor), as_list(op, "strides", strides, (int, float))
    if extra is not None:
        if not isinstance(extra_subdivision, int) or extra_subdivision < 1:
            raise ValueError(f"{op}: extra_subdivision must be positive, got {extra_subdivision!r}")
        if not isinstance(extra_stride, int | float):
            raise TypeError(f"{op}: extra_stride must be a number, got {type(extra_stride).__name__}")
        maps, strides = [*maps, extra], [*strides, extra_stride]
    named = {f"features[{i}]": map for i, map in enumerate(features)}
    check_tensors(op, {"extra": extra, "image_vector": image_vector, "count": count}, **named, rois=rois)
    if image_vector is not None and image_vector.dim() == 4:
        image_vector = image_vector.flatten(1)
    height, width = height_and_width(op, "output_size", output_size)
    return torch.ops.cascadeops.multiscale_roi_align(
        maps,
        rois,
        height,
        width,
        [1.0 / stride if stride else math.inf for stride in strides],
        sampling_ratio,
        aligned,
        finest_size,
        _EPSILON_INSIDE_LOG[level_rule],
        0 if extra is None else extra_subdivision,
        image_vector,
        count,
    )


@torch.library.register_fake("cascadeops::multiscale_roi_align")
def _(maps, rois, height, width, scales, ratio, aligned, finest_size, epsilon, subdivision, vector, count):
    op = "multiscale_roi_align"
    levels = len(maps) - (subdivision > 0)
    check_range(op, "the number of features", levels, 1, 8)
    check_range(op, "the length of strides", len(scales) - (subdivision > 0), levels, levels)
    names = [f"features[{i}]" for i in range(levels)] + ["extra"]
    shapes = {name: (map, f"N C H_{name} W_{name}") for name, map in zip(names, maps, strict=False)}
    check_shapes(op, **shapes, rois=(rois, "K 5"), image_vector=(vector, "N C"))
    torch._check(count is None or count.device == rois.device, lambda: f"{op}: count must be on the device of rois")
    for side in (height, width):
        check_range(op, "output_size", side, 1, 2**31 - 1)
    size = (rois.size(0), maps[0].size(1), height, width)
    return maps[0].new_empty(size).contiguous(memory_format=_memory_format(maps[0]))


@torch.library.register_fake("cascadeops::multiscale_roi_align_backward")
def _(grad, maps, rois, scales, ratio, aligned, finest_size, epsilon, subdivision, count):
    return [torch.empty_like(map, memory_format=_memory_format(map)) for map in maps]


def _memory_format(map):
    """The rule of csrc/layout.h."""
    channels_adjacent = map.size(1) > 1 and map.stride(1) == 1 and not map.is_contiguous()
    return torch.channels_last if channels_adjacent else torch.contiguous_format


def _save_for_backward(ctx, inputs, output):
    maps, rois, _, _, *ctx.settings, _, count = inputs
    ctx.save_for_backward(rois, count, *maps)


def _backward(ctx, grad):
    rois, count, *maps = ctx.saved_tensors
    grads, vector_grad = [None] * len(maps), None
    if any(ctx.needs_input_grad[0]):
        grads = torch.ops.cascadeops.multiscale_roi_align_backward(grad, maps, rois, *ctx.settings, count)
    if ctx.needs_input_grad[10]:
        vector_grad = _sum_by_image(grad, rois, count, maps[0].size(0))
    return grads, *[None] * 9, vector_grad, None


def _sum_by_image(grad: Tensor, rois: Tensor, count: Tensor | None, num_images: int) -> Tensor:
    """[N, C]: the sum of each image's rows of grad [K, C, h, w]; as a matrix product, so that its order is fixed."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    owned = rois[:, 0] == torch.arange(num_images, device=rois.device)[:, None]  # [N, K]
    if count is not None:
        owned = owned & (torch.arange(rois.size(0), device=rois.device) < count)
    # What stands in the gradient of a padding row, perhaps NaN, must not meet the product.
    sums = grad.sum((2, 3), dtype=dtype).where(owned.any(0)[:, None], 0)
    return (owned.to(dtype) @ sums).to(grad.dtype)


torch.library.register_autograd("cascadeops::multiscale_roi_align", _backward, setup_context=_save_for_backward)


def _save_for_double_backward(ctx, inputs, output):
    grad, maps, rois, *ctx.settings, count = inputs
    ctx.output_size = grad.shape[2:]
    ctx.save_for_backward(rois, count)
    ctx.num_maps = len(maps)


def _double_backward(ctx, grads):
    # The operator is linear in the maps, so the backward's own gradient is the forward pass.
    rois, count = ctx.saved_tensors
    pooled = torch.ops.cascadeops.multiscale_roi_align(grads, rois, *ctx.output_size, *ctx.settings, None, count)
    return pooled, [None] * ctx.num_maps, *[None] * 8


torch.library.register_autograd(
    "cascadeops::multiscale_roi_align_backward", _double_backward, setup_context=_save_for_double_backward
)
