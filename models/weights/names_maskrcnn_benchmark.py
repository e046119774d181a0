"""maskrcnn-benchmark (Faster and Mask R-CNN; the published Res2Net tables) -> mmdetection's names."""

from __future__ import annotations

import re
from collections.abc import Set

from torch import Tensor

from .rows import reorder

SOURCE = "maskrcnn-benchmark"
NAMES = [
    (r"^backbone\.body\.(?:stem\.)?", "backbone."),
    (r"^rpn\.head\.conv\.", "rpn_head.rpn_conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"^roi_heads\.box\.feature_extractor\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"^roi_heads\.box\.feature_extractor\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"^roi_heads\.box\.predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"^roi_heads\.box\.predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"^roi_heads\.mask\.predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
    (r"^roi_heads\.mask\.predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
]
COUNTED = [  # these count from 1
    (r"^backbone\.fpn\.fpn_inner(\d+)\.", "neck.lateral_convs.{}.conv."),
    (r"^backbone\.fpn\.fpn_layer(\d+)\.", "neck.fpn_convs.{}.conv."),
    (r"^roi_heads\.mask\.feature_extractor\.mask_fcn(\d+)\.", "roi_head.mask_head.convs.{}.conv."),
]
FIELDS = {
    "arithmetic": "maskrcnn_benchmark",
    "backbone.norm": "fixed_batch",
    "backbone.norm_eps": 0.0,
    "backbone.stride_in_1x1": True,
    "backbone.stage_pool": True,
}


def recognises(names: Set[str]) -> bool:
    return "backbone.body.stem.conv1.weight" in names


def translate(key: str, value: Tensor) -> tuple[str, Tensor, str]:
    """(mmdetection's name, value, what was done to the value)"""
    for pattern, replacement in COUNTED:
        if match := re.match(pattern, key):
            return replacement.format(int(match[1]) - 1) + key[match.end() :], value, ""
    for pattern, replacement in NAMES:
        if match := re.match(pattern, key):
            name = replacement + key[match.end() :]
            return name, *reorder(name, value)
    return key, value, ""
