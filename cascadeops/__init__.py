"""Detection and segmentation operators for PyTorch: RoIAlign, NMS, mask pasting, as CPU and CUDA kernels."""

import torch  # noqa: F401  (first: libc10 must be loaded before a binary of ours)

from cascadeops._binary import load as _load

_load()

from cascadeops.mask_targets import mask_targets  # noqa: E402
from cascadeops.multiclass_nms import multiclass_nms  # noqa: E402
from cascadeops.multiscale_roi_align import multiscale_roi_align  # noqa: E402
from cascadeops.padded_nms import padded_nms  # noqa: E402
from cascadeops.paste_masks import paste_masks  # noqa: E402
from cascadeops.paste_masks_rle import paste_masks_rle  # noqa: E402

__all__ = [
    "mask_targets",
    "multiclass_nms",
    "multiscale_roi_align",
    "padded_nms",
    "paste_masks",
    "paste_masks_rle",
]

__version__ = "0.1.0"
