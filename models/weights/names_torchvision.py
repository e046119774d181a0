"""torchvision's fasterrcnn_resnet50_fpn and maskrcnn_resnet50_fpn -> mmdetection's names.

The `_v2` forms have other heads (normalised convolutions, a second RPN convolution): their names stay as they are, and
the accounting lists them. torchvision 0.13 added an index to some names; both spellings are read.
"""

from __future__ import annotations

import re
from collections.abc import Set

from torch import Tensor

from .rows import reorder

SOURCE = "torchvision detector"
NAMES = [
    (r"^backbone\.body\.", "backbone."),
    (r"^backbone\.fpn\.inner_blocks\.(\d+)\.(?:0\.)?(?=weight|bias)", r"neck.lateral_convs.\1.conv."),
    (r"^backbone\.fpn\.layer_blocks\.(\d+)\.(?:0\.)?(?=weight|bias)", r"neck.fpn_convs.\1.conv."),
    (r"^rpn\.head\.conv\.(?:0\.0\.)?(?=weight|bias)", "rpn_head.rpn_conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"^roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"^roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"^roi_heads\.mask_head\.(\d)\.0\.(?=weight|bias)", r"roi_head.mask_head.convs.\1.conv."),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
]
OLD_MASK_CONV = re.compile(r"^roi_heads\.mask_head\.mask_fcn(\d)\.")
FIELDS = {"arithmetic": "torchvision"}
FROZEN_NORMS = {"backbone.norm": "fixed_batch", "backbone.norm_eps": 0.0}
"""Of files without num_batches_tracked: torchvision's frozen norms, whose epsilon its published detectors set to 0."""


def recognises(names: Set[str]) -> bool:
    return "backbone.body.conv1.weight" in names and any(name.startswith("backbone.fpn.inner_blocks") for name in names)


def translate(key: str, value: Tensor) -> tuple[str, Tensor, str]:
    """(mmdetection's name, value, what was done to the value)"""
    if match := OLD_MASK_CONV.match(key):
        return f"roi_head.mask_head.convs.{int(match[1]) - 1}.conv.{key[match.end() :]}", value, ""
    for pattern, replacement in NAMES:
        name, changed = re.subn(pattern, replacement, key)
        if changed:
            return name, *reorder(name, value)
    return key, value, ""
