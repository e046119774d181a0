"""Box-sized mask probabilities pasted into the image."""

import torch
from torch import Tensor

from cascadeops._arguments import as_float32, as_floating, check_range, check_shapes, height_and_width


def paste_masks(
    probs: Tensor,  # [N, h, w]
    boxes: Tensor,  # [N, 4] (x1, y1, x2, y2)
    image_size: tuple[int, int],
    threshold: float = 0.5,
    packed: bool = False,
) -> Tensor:
    """Masks at image size from box-sized probabilities. Allocates the result and nothing else of the image's size.

    The centre of every pixel is looked up in the mask stretched over its box: bilinear between cell centres, zero
    beyond the mask, as ``grid_sample(align_corners=False, padding_mode="zeros")`` in float32. A box without area
    (x2 <= x1 or y2 <= y1) gives an empty mask. CPU and CUDA agree byte for byte. No gradient.

    Args:
        probs: [N, h, w] in [0, 1]; float32, float16, bfloat16 or float64, each value rounded to float32.
        boxes: [N, 4], (x1, y1, x2, y2) in pixels of the image, finite; may reach beyond it. Any floating dtype, read as
            float32.
        image_size: (height, width), each at least 1.
        threshold: a pixel belongs to the mask when its probability is >= threshold. Negative: no threshold, the
            probability itself is returned as uint8. 0 would make every pixel of the image part of the mask: an error.
        packed: eight pixels to a byte: pixel x of a row is bit x % 8, counted from the lowest, of byte x // 8, as
            ``numpy.packbits(mask, axis=-1, bitorder="little")``; ``numpy.unpackbits`` undoes it. Bits beyond the width
            are 0. Needs a positive threshold.

    Returns:
        bool [N, H, W]; packed: uint8 [N, H, ceil(W / 8)]; for a negative threshold uint8 [N, H, W]:
        floor(255 * probability).

    Raises:
        RuntimeError: for a wrong shape, dtype, device, size or threshold; on the CPU also for a box that is not finite
            (on CUDA its mask is empty, and the row is noted for `raise_device_faults`).

    Source: ``_do_paste_mask`` of detectron2 and mmdetection, evaluated on the whole image (their CPU path cuts the
    faint outer half cell of large boxes, which only a threshold below 0.5 shows).
    """
    height, width = height_and_width("paste_masks", "image_size", image_size)
    probs, (boxes,) = as_floating("paste_masks", "probs", probs), as_float32("paste_masks", boxes=boxes)
    return torch.ops.cascadeops.paste_masks(probs, boxes, height, width, threshold, packed)


@torch.library.register_fake("cascadeops::paste_masks")
def _(probs: Tensor, boxes: Tensor, height: int, width: int, threshold: float, packed: bool = False):
    check_shapes("paste_masks", probs=(probs, "N h w"), boxes=(boxes, "N 4"))
    for size in (height, width):
        check_range("paste_masks", "image_size", size, 1, 2**23)
    if packed:
        return probs.new_empty(probs.shape[0], height, (width + 7) // 8, dtype=torch.uint8)
    return probs.new_empty(probs.shape[0], height, width, dtype=torch.bool if threshold >= 0 else torch.uint8)
