"""mmdetection 1.x -> 2.x and 3.x: heads without `roi_head.`, class 0 is the background."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor

from .rows import reorder

SOURCE = "mmdetection 1.x"
HEADS = ("bbox_head.", "mask_head.", "semantic_head.")
FIELDS = {"arithmetic": "mmdetection_1"}


def recognises(names: Set[str]) -> bool:
    heads = ("bbox_head.shared_fcs.0.weight", "bbox_head.0.shared_fcs.0.weight")
    return "rpn_head.rpn_conv.weight" in names and any(name in names for name in heads)


def translate(key: str, value: Tensor) -> tuple[str, Tensor, str]:
    """(mmdetection's present name, value, what was done to the value)"""
    if not key.startswith(HEADS):
        return key, value, ""
    return f"roi_head.{key}", *reorder(key, value)
