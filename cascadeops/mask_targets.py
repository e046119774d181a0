"""Mask targets of a mask head: each RoI's view of its ground-truth object, from bitmaps that are stored as crops."""

import torch
from torch import Tensor

from cascadeops._arguments import check_range, check_shapes, check_tensors


def mask_targets(
    bitmaps: Tensor,  # uint8 [total], the crops one after the other
    offsets: Tensor,  # int64 [G]
    windows: Tensor,  # int32 [G, 4] (x0, y0, width, height)
    boxes: Tensor,  # float32 [K, 4]
    index: Tensor,  # int64 [K]
    output_size: int = 28,
) -> Tensor:
    """Resamples the bitmap of each box's object inside the box, and thresholds it at half coverage.

    The same as RoIAlign (scale 1, adaptive sampling, aligned) of the object's bitmap at image size, followed by
    ``>= 0.5``, yet only the crop is stored and read: a window that is one pixel larger than the object, or ends where
    the image ends, shows the sampler the same values as the whole image does.

    Args:
        bitmaps: uint8 ``[total]``, values 0 and 1; the crop of object g is ``height x width`` values from
            ``offsets[g]`` on, row by row.
        offsets: int64 ``[G]``, where each crop begins in ``bitmaps``.
        windows: int32 ``[G, 4]``, the crop's place in the image, (x0, y0, width, height) in pixels; a border of zeros
            must surround the object except where the window touches the image's edge. Width 0: an empty object.
        boxes: float32 ``[K, 4]``, (x1, y1, x2, y2) in image pixels.
        index: int64 ``[K]``, the object of each box; -1 marks a padding row, whose target is 0.
        output_size: M, the side of a target.

    Returns:
        uint8 ``[K, M, M]``, values 0 and 1.

    Raises:
        RuntimeError: wrong shape, dtype or device. On the CPU also for an index outside ``[-1, G)``, a window that does
            not lie in ``bitmaps``, or a coordinate that is not finite; on CUDA such a row gives 0 and is noted for
            `raise_device_faults`.

    Source: He et al., "Mask R-CNN", ICCV 2017, section 3 ("the mask target is the intersection between an RoI and its
    associated ground-truth mask"); sampling as mmdetection 3 (``BitmapMasks.crop_and_resize``).
    """
    check_tensors("mask_targets", bitmaps=bitmaps, offsets=offsets, windows=windows, boxes=boxes, index=index)
    return torch.ops.cascadeops.mask_targets(bitmaps, offsets, windows, boxes, index, output_size)


@torch.library.register_fake("cascadeops::mask_targets")
def _(bitmaps, offsets, windows, boxes, index, output_size):
    check_shapes(
        "mask_targets",
        bitmaps=(bitmaps, "total"),
        offsets=(offsets, "G"),
        windows=(windows, "G 4"),
        boxes=(boxes, "K 4"),
        index=(index, "K"),
    )
    check_range("mask_targets", "output_size", output_size, 1, 2**15)
    return bitmaps.new_empty((boxes.size(0), output_size, output_size))
