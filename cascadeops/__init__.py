"""Detection and segmentation operators for PyTorch: RoIAlign, NMS, mask pasting, as CPU and CUDA kernels.

`python -m cascadeops` tells which kernels are loaded, and why others are not.
"""

import torch  # noqa: F401  (first: the binaries need torch's libraries in the process)

from cascadeops import _binary

__version__ = "0.1.0"

__all__ = [
    "DeformConv2d",
    "MultiScaleRoIAlign",
    "RoIAlign",
    "SelfCalibratedConv2d",
    "batched_nms",
    "box_proposals",
    "deform_conv2d",
    "mask_targets",
    "match_boxes",
    "multiclass_nms",
    "multiscale_roi_align",
    "nms",
    "padded_nms",
    "paste_masks",
    "paste_masks_rle",
    "polygon_mask_targets",
    "preprocess",
    "raise_device_faults",
    "roi_align",
    "self_calibrated_conv2d",
    "self_calibrated_gate",
]

_binary.load(__version__)

if _binary.cpu.path is not None:
    from cascadeops.box_proposals import box_proposals
    from cascadeops.deform_conv2d import DeformConv2d, deform_conv2d
    from cascadeops.device_faults import raise_device_faults
    from cascadeops.mask_targets import mask_targets
    from cascadeops.match_boxes import match_boxes
    from cascadeops.multiclass_nms import multiclass_nms
    from cascadeops.multiscale_roi_align import multiscale_roi_align
    from cascadeops.nms import batched_nms, nms
    from cascadeops.padded_nms import padded_nms
    from cascadeops.paste_masks import paste_masks
    from cascadeops.paste_masks_rle import paste_masks_rle
    from cascadeops.polygon_mask_targets import polygon_mask_targets
    from cascadeops.preprocess import preprocess
    from cascadeops.roi_align import MultiScaleRoIAlign, RoIAlign, roi_align
    from cascadeops.self_calibrated_conv2d import SelfCalibratedConv2d, self_calibrated_conv2d
    from cascadeops.self_calibrated_gate import self_calibrated_gate
else:  # importing never fails: each operator says what is wrong when it is called
    globals().update({name: _binary.missing(name) for name in __all__})
