"""Mask targets the long way: every ground-truth bitmap at image size, RoIAlign on it."""

import torch
from torch import Tensor

from cascadeops.reference.multiscale_roi_align import average_samples, sample_positions


def mask_targets(
    bitmaps: Tensor,  # uint8 [total], the crops one after the other
    offsets: Tensor,  # int64 [G]
    windows: Tensor,  # int32 [G, 4] (x0, y0, width, height)
    boxes: Tensor,  # float32 [K, 4]
    index: Tensor,  # int64 [K]
    output_size: int,
    image_size: tuple[int, int],  # (height, width) of the image that the windows lie in
) -> Tensor:
    """Defines :func:`cascadeops.mask_targets`, which needs no image_size because it never leaves the crop."""
    coverage = mask_coverage(bitmaps, offsets, windows, boxes, index, output_size, image_size)
    return (coverage >= 0.5).to(torch.uint8)


def mask_coverage(
    bitmaps: Tensor,
    offsets: Tensor,
    windows: Tensor,
    boxes: Tensor,
    index: Tensor,
    output_size: int,
    image_size: tuple[int, int],
) -> Tensor:
    """Share of each target cell that the object covers, float32 [K, M, M], before the threshold."""
    coverage = torch.zeros(len(boxes), output_size, output_size, device=boxes.device)
    for k, (box, g) in enumerate(zip(boxes, index.tolist(), strict=True)):
        if g < 0:
            continue
        x0, y0, width, height = windows[g].tolist()
        crop = bitmaps[offsets[g] : offsets[g] + width * height].view(height, width)
        bitmap = torch.zeros(1, *image_size, device=boxes.device)
        bitmap[0, y0 : y0 + height, x0 : x0 + width] = crop
        x1, y1, x2, y2 = box - 0.5
        ys = sample_positions(y1, y2, output_size, sampling_ratio=0, aligned=True)
        xs = sample_positions(x1, x2, output_size, sampling_ratio=0, aligned=True)
        coverage[k] = average_samples(bitmap, ys, xs)[0]
    return coverage
