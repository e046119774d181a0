"""Which few shapes the pictures of a data set are padded to, where every shape costs something: a CUDA graph or a
compilation each."""

from __future__ import annotations

from .data.transforms import DIVISOR, padded_size

STEPS = 10
"""A step is about a tenth of the long side's limit. For the published (800, 1333) it is 128 pixels, and the steps below
1344 meet COCO's two common shapes, 4:3 and 3:2, exactly: 800 x 1088 and 800 x 1216."""


def bucket_size(height: int, width: int, resize: tuple[int, int] | None) -> tuple[int, int]:
    """The shape that a picture is padded to; the same for every picture of about its shape.

    Both sides are rounded up to their limit less a whole number of steps. A picture lies on one of its two limits after
    resizing, so that a data set meets a handful of shapes for each orientation: five for landscape pictures from 1:1 to
    5:3 at (800, 1333).

    Args:
        height, width: of the picture as the network sees it, after resizing; at least 1 pixel.
        resize: the (short, long) limits of the sides; None: pictures come as they are, and each padded size of theirs
            is its own bucket.

    Returns:
        (height, width), multiples of 32, not below those given, and not above the limits unless a side given is.
    """
    if resize is None:
        return padded_size(height, width)
    short, long = padded_size(*resize)
    step = max(DIVISOR, long // STEPS // DIVISOR * DIVISOR)
    limits = (short, long) if height <= width else (long, short)
    height, width = (limit - (limit - side) // step * step for side, limit in zip((height, width), limits, strict=True))
    return height, width
