"""RoIAlign over a feature pyramid in one operator: level choice, sampling, and the gradient."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

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
) -> Tensor:
    """Pools each RoI from the pyramid level that fits its size, by RoIAlign.

    A RoI is cut into ``output_size`` bins. The value of a bin is the mean of bilinear samples on a regular grid inside
    it. A cell's value sits at its centre; a sample less than one cell outside the map takes the border's value, one
    further out counts as 0. Differentiable in ``features``; ``rois`` get no gradient.

    Args:
        features: 1 to 8 maps ``[N, C, H_l, W_l]``, finest first; float32, float16, bfloat16 or float64, all alike.
            Channels-last maps are the fast case; others are read where they are, without a copy of the whole map.
        rois: ``[K, 5]`` float32, (batch index, x1, y1, x2, y2) in image pixels. A batch index of -1 marks a padding
            row: its output is 0 and it adds no gradient. A reversed box (x2 < x1 or y2 < y1) gives 0, too.
        output_size: bins per RoI, (height, width) or one number for both.
        strides: image pixels per cell of each level.
        sampling_ratio: samples per bin along each axis; 0 (or less) takes as many as the bin has cells, rounded up.
        aligned: True shifts by half a cell, so that pixel (0, 0) covers [0, 1) in image coordinates. False is the first
            RoIAlign: no shift, and boxes are at least one cell wide and high.
        finest_size: RoIs smaller than twice this many pixels, as the square root of their area, use the finest level.
        level_rule: where the 1e-6 stands that keeps exact powers of two on the coarser level. ``"mmdet"``:
            floor(log2(size / finest_size + 1e-6)); ``"torchvision"``: floor(log2(size / finest_size) + 1e-6); clamped
            to the levels there are.

    Returns:
        ``[K, C, height, width]``, dtype of the features; channels-last in memory if the channels of ``features[0]`` are
        adjacent in memory.

    Raises:
        ValueError: unknown ``level_rule``.
        RuntimeError: wrong shape, dtype or device. On the CPU also for a batch index outside ``[-1, N)`` or a
            coordinate that is not finite; on CUDA, where looking would stall the device, such a row gives 0 instead. In
            the backward pass on CUDA, which adds with atomics, if ``torch.use_deterministic_algorithms(True)`` is set.

    Source: He et al., "Mask R-CNN", ICCV 2017, section 3 (RoIAlign); Lin et al., "Feature Pyramid Networks for Object
    Detection", CVPR 2017, equation 1 (level choice).
    """
    if level_rule not in _EPSILON_INSIDE_LOG:
        raise ValueError(f'multiscale_roi_align: level_rule must be "mmdet" or "torchvision", got {level_rule!r}')
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    return torch.ops.cascadeops.multiscale_roi_align(
        list(features),
        rois,
        height,
        width,
        [1.0 / stride for stride in strides],
        sampling_ratio,
        aligned,
        finest_size,
        _EPSILON_INSIDE_LOG[level_rule],
    )


@torch.library.register_fake("cascadeops::multiscale_roi_align")
def _(features, rois, height, width, spatial_scales, sampling_ratio, aligned, finest_size, epsilon_inside_log):
    size = (rois.size(0), features[0].size(1), height, width)
    return features[0].new_empty(size).contiguous(memory_format=_memory_format(features[0]))


@torch.library.register_fake("cascadeops::multiscale_roi_align_backward")
def _(grad, features, rois, spatial_scales, sampling_ratio, aligned, finest_size, epsilon_inside_log):
    return [torch.empty_like(feature, memory_format=_memory_format(feature)) for feature in features]


def _memory_format(map):
    """The rule of csrc/layout.h."""
    channels_adjacent = map.size(1) > 1 and map.stride(1) == 1 and not map.is_contiguous()
    return torch.channels_last if channels_adjacent else torch.contiguous_format


def _save_for_backward(ctx, inputs, output):
    features, rois, _, _, *ctx.settings = inputs
    ctx.save_for_backward(rois, *features)


def _backward(ctx, grad):
    rois, *features = ctx.saved_tensors
    if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        _alert_not_deterministic()
    grads = torch.ops.cascadeops.multiscale_roi_align_backward(grad, features, rois, *ctx.settings)
    return grads, *[None] * 8


def _alert_not_deterministic():
    message = (
        "multiscale_roi_align: the backward pass on CUDA adds in an order that changes from run to run. "
        "torch.use_deterministic_algorithms(True) asks for a fixed one: turn it off, or pass warn_only=True."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


torch.library.register_autograd("cascadeops::multiscale_roi_align", _backward, setup_context=_save_for_backward)


def _save_for_double_backward(ctx, inputs, output):
    grad, features, rois, *ctx.settings = inputs
    ctx.output_size = grad.shape[2:]
    ctx.save_for_backward(rois)
    ctx.num_levels = len(features)


def _double_backward(ctx, grads):
    # The operator is linear in the features, so the backward's own gradient is the forward pass.
    (rois,) = ctx.saved_tensors
    pooled = torch.ops.cascadeops.multiscale_roi_align(grads, rois, *ctx.output_size, *ctx.settings)
    return pooled, [None] * ctx.num_levels, *[None] * 6


torch.library.register_autograd(
    "cascadeops::multiscale_roi_align_backward", _double_backward, setup_context=_save_for_double_backward
)
