"""Paddle's HTC (laihuihui/htc, and backbones in PaddleDetection's spelling) -> mmdetection's names.

Fully connected layers are stored [in, out] there; convolutions as here.
"""

from __future__ import annotations

import re
from collections.abc import Set

from torch import Tensor

SOURCE = "Paddle"
NORM = {"weight": "weight", "bias": "bias", "_mean": "running_mean", "_variance": "running_var"}
BLOCK = re.compile(r"^(?:backbone\.)?res(\d)\.res\1([a-z])(\d*)\.(branch2[abc]|short)\.(conv|norm)\.(\w+)$")
STEM = re.compile(r"^(?:backbone\.)?conv1\.conv1\.(conv|norm)\.(\w+)$")
NAMES = [
    (r"^rpn_head\.rpn_feat\.rpn_conv\.", "rpn_head.rpn_conv."),
    (r"^rpn_head\.rpn_rois_score\.", "rpn_head.rpn_cls."),
    (r"^rpn_head\.rpn_rois_delta\.", "rpn_head.rpn_reg."),
    (r"^bbox_head\.head\.(\d)\.fc6\.", r"roi_head.bbox_head.\1.shared_fcs.0."),
    (r"^bbox_head\.head\.(\d)\.fc7\.", r"roi_head.bbox_head.\1.shared_fcs.1."),
    (r"^bbox_head\.bbox_score_stage(\d)\.", r"roi_head.bbox_head.\1.fc_cls."),
    (r"^bbox_head\.bbox_delta_stage(\d)\.", r"roi_head.bbox_head.\1.fc_reg."),
    (r"^bbox_head\.mask_head\.head\.", "roi_head.mask_head."),
    (r"^fused_semantic_head\.conv_embedding\.", "roi_head.semantic_head.conv_embedding.conv."),
    (r"^fused_semantic_head\.", "roi_head.semantic_head."),
]
FIELDS = {
    "arithmetic": "mmdetection",
    "stage_stds": ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (1 / 30, 1 / 30, 1 / 15, 1 / 15)),
    "match_low_quality": False,
}


def recognises(names: Set[str]) -> bool:
    return any(BLOCK.match(name) or name.startswith("bbox_head.bbox_score_stage") for name in names)


def translate(key: str, value: Tensor) -> tuple[str, Tensor, str]:
    """(mmdetection's name, value, what was done to the value)"""
    if match := STEM.match(key):
        return "backbone." + _layer(match[1], match[2], "conv1", "bn1"), value, ""
    if match := BLOCK.match(key):
        stage, letter, number, branch, kind, tail = match.groups()
        block = int(number) if number else ord(letter) - ord("a")  # res4a, res4b1 .. res4b22 of ResNet-101
        if branch == "short":
            names = ("downsample.0", "downsample.1")
        else:
            position = "abc".index(branch[-1]) + 1
            names = (f"conv{position}", f"bn{position}")
        return f"backbone.layer{int(stage) - 1}.{block}." + _layer(kind, tail, *names), value, ""
    for pattern, replacement in NAMES:
        name, changed = re.subn(pattern, replacement, key)
        if changed:
            linear = value.dim() == 2 and re.search(r"\.(shared_fcs\.\d|fc_cls|fc_reg)\.weight$", name)
            return (name, value.t().contiguous(), "transposed: [in, out] to [out, in]") if linear else (name, value, "")
    return key, value, ""


def _layer(kind: str, tail: str, conv: str, norm: str) -> str:
    return f"{conv}.{tail}" if kind == "conv" else f"{norm}.{NORM.get(tail, tail)}"
