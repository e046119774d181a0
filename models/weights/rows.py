"""Rows of a last layer, reordered: other projects put the background first, ours is last and needs no box or mask."""

from __future__ import annotations

import torch
from torch import Tensor


def background_last(value: Tensor) -> Tensor:
    """[1 + K, ...] -> [K + 1, ...]"""
    return torch.cat([value[1:], value[:1]])


def without_background(value: Tensor, rows: int) -> Tensor:
    """[(1 + K) * rows, ...] -> [K * rows, ...]"""
    return value[rows:].clone()


def reorder(key: str, value: Tensor) -> tuple[Tensor, str]:
    """The last layers of a head whose class 0 is the background, by mmdetection's name: (value, what was done)."""
    kind = key.rsplit(".", 2)[-2]
    if kind == "fc_cls" and value.dim() and len(value) > 1:
        return background_last(value), "background row moved from first to last"
    if kind == "fc_reg" and value.dim() and len(value) > 4:
        return without_background(value, 4), "the background's 4 rows left out"
    if kind == "conv_logits" and "semantic" not in key and value.dim() and len(value) > 1:
        return without_background(value, 1), "the background's row left out"
    return value, ""
