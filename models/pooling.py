"""RoI features of a pyramid, in the arithmetic of the detector's configuration."""

from __future__ import annotations

import torch
from torch import Tensor

import cascadeops

from .arithmetic import ARITHMETICS, Arithmetic
from .boxes import LAST_PIXEL, constant
from .fpn import FPN
from .heads import SemanticHead

STRIDES = FPN.strides[:-1]
SEMANTIC_STRIDE = FPN.strides[SemanticHead.fused_level]


def pool_rois(
    features: list[Tensor],
    rois: Tensor,
    size: int,
    config,
    semantic: Tensor | None = None,
    semantic_subdivision: int = 1,
    image: Tensor | None = None,
) -> Tensor:
    """Features of each RoI from the level that fits its size, and what is added to them.

    Args:
        features: P2..P5, each [N, C, H_l, W_l].
        rois: [R, 5] (batch index, x1, y1, x2, y2); index -1 marks padding, whose features are 0.
        size: side of the grid of bins.
        config: a detector's; `finest_size` and `arithmetic` are read.
        semantic: the semantic branch's embedding [N, C, H/8, W/8].
        semantic_subdivision: it is pooled into so many times finer bins, whose mean is taken.
        image: a vector of each image, [N, C, 1, 1].

    Returns:
        [R, C, size, size]
    """
    arithmetic = ARITHMETICS[config.arithmetic]
    if arithmetic.inclusive:
        return _pool_inclusive(
            features, rois, size, config.finest_size, arithmetic, semantic, semantic_subdivision, image
        )
    return cascadeops.multiscale_roi_align(
        features,
        rois,
        size,
        STRIDES,
        arithmetic.roi_samples,
        arithmetic.roi_aligned,
        config.finest_size,
        arithmetic.level_rule,
        extra=semantic,
        extra_stride=SEMANTIC_STRIDE,
        extra_subdivision=semantic_subdivision,
        image_vector=image,
    )


def _pool_inclusive(
    features: list[Tensor],
    rois: Tensor,
    size: int,
    finest_size: float,
    arithmetic: Arithmetic,
    semantic: Tensor | None,
    subdivision: int,
    image: Tensor | None,
) -> Tensor:
    """Level by level, since a RoI's level goes by its size with the last pixel, which is not what is pooled."""
    side = (rois[:, 3] - rois[:, 1]).mul(rois[:, 4] - rois[:, 2]).sqrt()
    levels = torch.log2(side / finest_size + arithmetic.level_epsilon).floor().clamp(0, len(features) - 1)
    pooled = 0.0
    for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        own = _as_pooled(rois, stride, arithmetic, levels == level)
        pooled = pooled + _pool(feature, own, size, stride, arithmetic, image=image)
    if semantic is not None:
        own = _as_pooled(rois, SEMANTIC_STRIDE, arithmetic, levels >= 0)
        fine = _pool(semantic, own, size * subdivision, SEMANTIC_STRIDE, arithmetic)
        pooled = pooled + torch.nn.functional.avg_pool2d(fine, subdivision)
    return pooled


def _as_pooled(rois: Tensor, stride: int, arithmetic: Arithmetic, chosen: Tensor) -> Tensor:
    """The chosen RoIs [R, 5] as RoIAlign is to see them on a map of this stride; the others as padding."""
    # stride / 2 undoes the half cell of the aligned RoIAlign, which has no least size
    last_pixel = constant(LAST_PIXEL, rois)
    boxes = rois[:, 1:] + stride / 2 if arithmetic.roi_last_pixel else rois[:, 1:] - last_pixel
    return torch.cat([torch.where(chosen, rois[:, 0], -1.0)[:, None], boxes], dim=1)


def _pool(
    feature: Tensor, rois: Tensor, size: int, stride: int, arithmetic: Arithmetic, image: Tensor | None = None
) -> Tensor:
    aligned = arithmetic.roi_aligned or arithmetic.roi_last_pixel
    return cascadeops.multiscale_roi_align(
        [feature], rois, size, [stride], arithmetic.roi_samples, aligned, image_vector=image
    )
