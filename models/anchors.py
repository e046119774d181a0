"""Anchors of a feature pyramid."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_anchors(
    sizes: list[tuple[int, int]], strides: list[int], scale: float, ratios: tuple[float, ...], device: torch.device
) -> list[Tensor]:
    """Anchor boxes of every level, in the flat order (y, x, ratio) of `permute(0, 2, 3, 1)`-ed RPN outputs.

    Args:
        sizes: (height, width) of each level in cells.
        strides: pixels per cell.
        scale: side of the square anchor in cells.
        ratios: height / width.

    Returns:
        One [H_l * W_l * len(ratios), 4] tensor a level, in pixels. An anchor is centred on its cell's top left corner.
    """
    anchors = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        root = torch.tensor(ratios, device=device).sqrt()
        half_height, half_width = stride * scale * root / 2, stride * scale / root / 2
        base = torch.stack([-half_width, -half_height, half_width, half_height], dim=-1)
        y, x = torch.meshgrid(
            torch.arange(height, device=device) * stride, torch.arange(width, device=device) * stride, indexing="ij"
        )
        shift = torch.stack([x, y, x, y], dim=-1)
        anchors.append((shift[:, :, None] + base).reshape(-1, 4))
    return anchors
