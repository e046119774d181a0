"""Images as a decoder gives them to the batch that a network takes, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascadeops._arguments import as_list, check_range, check_shapes, check_tensors


def preprocess(
    images: Sequence[Tensor],  # N of uint8 [H, W, 3], each of its own size
    resize: tuple[float, float] | None = None,
    mean: Sequence[float] = (123.675, 116.28, 103.53),
    std: Sequence[float] = (58.395, 57.12, 57.375),
    divisor: int = 32,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> tuple[Tensor, Tensor]:
    """Resizes, normalises, pads with 0 and batches uint8 images; on CUDA one launch for up to 64 of them.

    Resizing is bilinear with pixel centres at halves and no antialiasing, as OpenCV's ``INTER_LINEAR``, which however
    rounds to whole numbers: before normalisation its values are at most 1 apart from these. A pixel becomes
    ``(value - mean) / std``, computed in float32 and rounded to ``dtype`` once. No gradient.

    Args:
        images: at least one; strides are free, so that crops and ``[3, H, W]`` images seen as ``[H, W, 3]`` are read
            where they lie. All on one device, which is the result's.
        resize: None: sizes stay; (short, long): each image gets the largest size, aspect kept, whose shorter side is at
            most `short` and whose longer side is at most `long` pixels, both rounded half up.
        mean, std: of each channel, in the units of the pixels, 0..255. The default is ImageNet's, for RGB.
        divisor: height and width of the batch, those of the largest image, are rounded up to a multiple of it.
        dtype: float32, float16 or bfloat16.
        memory_format: of the batch: ``torch.channels_last`` or ``torch.contiguous_format``.

    Returns:
        The batch ``[N, 3, H, W]``, image n in the upper left corner of its plane and 0 in the rest; and the sizes int64
        ``[N, 2]``, (height, width) of each image before padding, on the same device.

    Raises:
        TypeError: `images` is no list of tensors.
        ValueError: no image, or an image, `resize`, `divisor` or `memory_format` that is none.
        RuntimeError: an image that is not uint8 [H, W, 3] of 1 to 2**23 pixels a side, or on another device; another
            dtype; a mean or std that is not three finite numbers, or a std that is not above 0.

    Source: the size rule and the order of operations are those of mmdetection (``Resize``, ``Normalize``, ``Pad``).
    """
    images = as_list("preprocess", "images", images, Tensor)
    if not images:
        raise ValueError("preprocess: images must hold at least one image")
    check_tensors("preprocess", **{f"images[{i}]": image for i, image in enumerate(images)})
    for i, image in enumerate(images):
        if image.dim() != 3 or 0 in image.shape:
            raise ValueError(f"preprocess: images[{i}] must have shape [H, W, 3], got {list(image.shape)}")
    if not isinstance(divisor, int) or divisor < 1:
        raise ValueError(f"preprocess: divisor must be at least 1, got {divisor!r}")
    mean, std = (as_list("preprocess", name, value, (int, float)) for name, value in (("mean", mean), ("std", std)))
    if resize is not None and len(as_list("preprocess", "resize", resize, (int, float))) != 2:
        raise ValueError(f"preprocess: resize must be (short, long), got {resize}")
    if memory_format not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(
            f"preprocess: memory_format must be torch.channels_last or torch.contiguous_format, got {memory_format}"
        )
    sizes = [_target_size(image, resize) for image in images]
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
    return torch.ops.cascadeops.preprocess(
        images,
        [side for size in sizes for side in size],
        height,
        width,
        mean,
        std,
        dtype,
        memory_format == torch.channels_last,
    )


def _target_size(image: Tensor, resize: tuple[float, float] | None) -> tuple[int, int]:
    height, width, _ = image.shape
    if resize is None:
        return height, width
    short, long = resize
    if not (short > 0 and long > 0):
        raise ValueError(f"preprocess: resize must be (short, long) above 0, got {tuple(resize)}")
    factor = min(short / min(height, width), long / max(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


@torch.library.register_fake("cascadeops::preprocess")
def _(images, sizes, height, width, mean, std, dtype, channels_last):
    check_shapes("preprocess", **{f"images[{i}]": (image, "* * 3") for i, image in enumerate(images)})
    for size in (height, width):
        check_range("preprocess", "the size of images, resized and padded to divisor,", size, 1, 2**23)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    batch = images[0].new_empty(len(images), 3, height, width, dtype=dtype)
    return batch.contiguous(memory_format=memory_format), images[0].new_empty(len(images), 2, dtype=torch.int64)
