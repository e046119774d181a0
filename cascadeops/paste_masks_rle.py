"""Box-sized mask probabilities straight to COCO run-length encoding."""

import ctypes
import itertools

import torch
from torch import Tensor

from cascadeops._arguments import as_float32, as_floating, check_range, check_shapes, height_and_width


def paste_masks_rle(probs: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5) -> list[dict]:
    """``pycocotools.mask.encode`` of ``paste_masks``, byte for byte, without an image-sized mask.

    Each mask is walked down the columns of its own box; memory grows with the length of the result. The result lives
    on the host: with CUDA tensors this is the one mask operator that waits for the device (once for the total size and
    once for the bytes).

    Args:
        probs: [N, h, w] in [0, 1]; float32, float16, bfloat16 or float64, each value rounded to float32.
        boxes: [N, 4], (x1, y1, x2, y2) in pixels of the image, finite; may reach beyond it. Any floating dtype, read as
            float32.
        image_size: (height, width), each at least 1; fewer than 2**32 pixels, since COCO's run lengths have 32 bits.
        threshold: a pixel belongs to the mask when its probability is >= threshold; greater than 0.

    Returns:
        N dicts {"size": [height, width], "counts": bytes}.

    Raises:
        RuntimeError: as ``paste_masks``.

    Source: pasting as ``paste_masks``; format of github.com/cocodataset/cocoapi, common/maskApi.
    """
    height, width = height_and_width("paste_masks_rle", "image_size", image_size)
    probs, (boxes,) = as_floating("paste_masks_rle", "probs", probs), as_float32("paste_masks_rle", boxes=boxes)
    counts, offsets = torch.ops.cascadeops.paste_masks_rle(probs, boxes, height, width, threshold)
    counts, ends = counts.cpu(), offsets.tolist()
    text = ctypes.string_at(counts.data_ptr(), len(counts))
    return [{"size": [height, width], "counts": text[begin:end]} for begin, end in itertools.pairwise(ends)]


@torch.library.register_fake("cascadeops::paste_masks_rle")
def _(probs: Tensor, boxes: Tensor, height: int, width: int, threshold: float):
    check_shapes("paste_masks_rle", probs=(probs, "N h w"), boxes=(boxes, "N 4"))
    for size in (height, width):
        check_range("paste_masks_rle", "image_size", size, 1, 2**23)
    length = torch.library.get_ctx().new_dynamic_size()
    return (
        probs.new_empty(length, dtype=torch.uint8),
        probs.new_empty(probs.shape[0] + 1, dtype=torch.int64),
    )


@torch.library.register_vmap("cascadeops::paste_masks_rle")
def _(info, in_dims, *arguments):
    raise RuntimeError("paste_masks_rle: no torch.vmap, since run lengths are bytes, not tensors: write a loop")
