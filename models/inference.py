"""From images to results in one call."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import cascadeops

from .arithmetic import ARITHMETICS, MMDETECTION, Arithmetic
from .boxes import LAST_PIXEL, constant, resize_boxes
from .data.transforms import DIVISOR, MEAN, STD
from .detections import Detections
from .errors import UsageError
from .results import Result
from .sources import checked_pixels
from .tta import Views, detect_in_views
from .whole_pixel_masks import whole_pixel_masks


@torch.inference_mode()
def predict(
    detector: torch.nn.Module, image, resize: tuple[int, int] | None = None, tta: Views | None = None
) -> Result | list[Result]:
    """Finds objects in one image or in a batch.

    Args:
        detector: on any device; it is used in eval mode.
        image: uint8 RGB [H, W, 3] (numpy or tensor), or a list of such: a list is ONE batch.
        resize: None: as it is; (short, long): the largest size within these limits in pixels, aspect ratio kept.
        tta: `models.Views()` or others: test-time augmentation, for HTC and SCNet; image by image.

    Returns:
        `Result`, or a list of them for a list.

    Raises:
        TypeError, ValueError: the image is not uint8 RGB [H, W, 3]; names its position in the list.
        UsageError: `tta` with `resize`, or for another detector.
    """
    if tta is not None and resize is not None:
        raise UsageError("resize and tta both set the size", why=f"got {resize} and {tta}", fix="leave resize out")
    images = image if isinstance(image, list | tuple) else [image]
    arrays = [checked_pixels(item, f"image {i}" if images is image else "image") for i, item in enumerate(images)]
    if not arrays:
        return []
    was_training = detector.training
    detector.eval()
    try:
        batch, sizes = make_batch(arrays, resize, next(detector.parameters()).device)
        found = detector(batch, sizes) if tta is None else detect_in_views(detector, batch, sizes, tta)
        arithmetic = ARITHMETICS[detector.config.arithmetic]
        results = unpack_detections(found, sizes, [array.shape[:2] for array in arrays], arithmetic)
    finally:
        detector.train(was_training)
    return results if images is image else results[0]


def make_batch(images: list[np.ndarray], resize: tuple[int, int] | None, device) -> tuple[Tensor, Tensor]:
    """uint8 [H, W, 3] images -> normalised, zero-padded [N, 3, H, W], and [N, 2] (height, width) before padding."""
    pixels = [torch.from_numpy(np.require(image, requirements="CW")).to(device) for image in images]
    return cascadeops.preprocess(pixels, resize, MEAN, STD, DIVISOR)


def unpack_detections(
    detections: Detections,
    network_sizes: Tensor,
    image_sizes: list[tuple[int, int]],
    arithmetic: Arithmetic = MMDETECTION,
) -> list[Result]:
    """Fixed-capacity detections -> one `Result` an image, in pixels of the originals; reads the counts (one sync).

    Args:
        network_sizes: [N, 2] (height, width) of the images as the network saw them, without padding.
        image_sizes: (height, width) of the originals.
        arithmetic: the detector's.
    """
    results = []
    counts = detections.count.tolist()
    cascadeops.raise_device_faults(detections.count.device)
    for i, (count, size, seen) in enumerate(zip(counts, image_sizes, network_sizes.tolist(), strict=True)):
        scale = torch.tensor([size[1] / seen[1], size[0] / seen[0]], device=detections.boxes.device).repeat(2)
        boxes = resize_boxes(detections.boxes[i, :count], scale, arithmetic)
        masks = None
        if detections.mask_probs is not None:
            masks = _run_lengths(detections.mask_probs[i, :count], boxes, size, arithmetic)
        scores, labels = detections.scores[i, :count].float().cpu(), detections.labels[i, :count].cpu()
        results.append(Result(boxes.float().cpu(), scores, labels, masks, tuple(size)))
    return results


def _run_lengths(probs: Tensor, boxes: Tensor, image_size: tuple[int, int], arithmetic: Arithmetic) -> list[dict]:
    if arithmetic.mask_border is None:
        return cascadeops.paste_masks_rle(probs, boxes, image_size)
    if arithmetic.inclusive:
        boxes = boxes - constant(LAST_PIXEL, boxes)
    return whole_pixel_masks(probs, boxes, image_size, arithmetic.mask_border)
