"""RoIAlign over a feature pyramid, sample by sample."""

import torch
from torch import Tensor


def multiscale_roi_align(
    features: list[Tensor],  # L maps [N, C, H_l, W_l], finest first
    rois: Tensor,  # [K, 5] (batch index, x1, y1, x2, y2)
    output_size: int | tuple[int, int],
    strides: list[float],
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
    """Defines :func:`cascadeops.multiscale_roi_align`; half types are computed in float32 and rounded at the end."""
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    rows = len(rois) if count is None else int(count)
    levels = choose_levels(rois[:rows], len(features), finest_size, level_rule).tolist()
    pooled = torch.zeros(len(rois), features[0].shape[1], height, width, dtype=dtype, device=rois.device)
    values = []
    for k in range(len(rois)):
        image = int(rois[k, 0]) if k < rows else -1
        if image < 0:
            values.append(pooled[k])
            continue

        def pool(map, stride, scale, k=k, image=image):
            x1, y1, x2, y2 = rois[k, 1:].to(dtype) * (1 / stride) - (0.5 if aligned else 0.0)
            ys = sample_positions(y1, y2, scale * height, sampling_ratio, aligned)
            xs = sample_positions(x1, x2, scale * width, sampling_ratio, aligned)
            return average_samples(map[image].to(dtype), ys, xs)

        value = pool(features[levels[k]], strides[levels[k]], 1)
        if extra is not None:
            finer = pool(extra, extra_stride, extra_subdivision)
            value = value + torch.nn.functional.avg_pool2d(finer, extra_subdivision)
        if image_vector is not None:
            value = value + image_vector[image].to(dtype).reshape(-1, 1, 1)
        values.append(value)
    return (torch.stack(values) if values else pooled).to(features[0].dtype)


def choose_levels(rois: Tensor, num_levels: int, finest_size: float, level_rule: str) -> Tensor:
    """Pyramid level of each RoI, int64 [K]: floor(log2(sqrt(area) / finest_size)), clamped to the levels there are.

    To the argument of log2 ("mmdet") or to its value ("torchvision") 1e-6 is added.
    """
    boxes = rois[:, 1:].float()
    scale = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt() / finest_size
    scale = {"mmdet": scale + 1e-6, "torchvision": scale * 2**1e-6}[level_rule]
    # The exponent is exact where log2 rounds: frexp gives scale = mantissa * 2^exponent with mantissa in [0.5, 1).
    exponent = torch.frexp(scale).exponent.long() - 1
    exponent = exponent.where(scale.isfinite(), torch.where(scale == torch.inf, num_levels, 0))
    return exponent.clamp(0, num_levels - 1)


def sample_positions(low: Tensor, high: Tensor, bins: int, sampling_ratio: int, aligned: bool) -> Tensor:
    """Sample coordinates along one axis, [bins, samples per bin], in cells; no samples for an empty or reversed box."""
    size = high - low if aligned else (high - low).clamp(min=1)
    samples = sampling_ratio if sampling_ratio > 0 else int(torch.ceil(size / bins))
    samples = samples if size >= 0 else 0
    bin_size = size / bins
    starts = low + torch.arange(bins, dtype=low.dtype, device=low.device) * bin_size
    return starts[:, None] + (torch.arange(samples, dtype=low.dtype, device=low.device) + 0.5) * bin_size / max(
        samples, 1
    )


def average_samples(feature: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """Mean over each bin's bilinear samples: feature [C, H, W], ys [h, a], xs [w, b] -> [C, h, w]."""
    (bins_y, samples_y), (bins_x, samples_x) = ys.shape, xs.shape
    values = bilinear(feature, ys.flatten(), xs.flatten())
    values = values.unflatten(2, (bins_x, samples_x)).unflatten(1, (bins_y, samples_y))
    return values.sum((2, 4)) / max(samples_y * samples_x, 1)


def bilinear(feature: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """Samples feature [C, H, W] on the grid ys x xs.

    A cell's value sits at its integer coordinate. A position less than one cell outside the map takes the border's
    value, one further out gives 0.
    """
    y_low, y_high, y_weight, y_inside = neighbours(ys, feature.shape[1])
    x_low, x_high, x_weight, x_inside = neighbours(xs, feature.shape[2])
    y_weight, x_weight = y_weight[:, None], x_weight[None, :]
    value = (
        feature[:, y_low[:, None], x_low] * (1 - y_weight) * (1 - x_weight)
        + feature[:, y_low[:, None], x_high] * (1 - y_weight) * x_weight
        + feature[:, y_high[:, None], x_low] * y_weight * (1 - x_weight)
        + feature[:, y_high[:, None], x_high] * y_weight * x_weight
    )
    return value * (y_inside[:, None] & x_inside[None, :])


def neighbours(positions: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two cells around each position, the weight of the higher one, and whether the position counts at all."""
    inside = (positions >= -1) & (positions <= size)
    clamped = positions.clamp(0, size - 1)
    low = clamped.long()
    high = (low + 1).clamp(max=size - 1)
    return low, high, clamped - low, inside
