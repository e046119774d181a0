"""Anchors of a feature pyramid."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_anchors(
    sizes: list[tuple[int, int]],
    strides: list[int],
    scale: float,
    ratios: tuple[float, ...],
    device: torch.device,
    rule: str = "exact",
) -> list[Tensor]:
    """Anchor boxes of every level, in the flat order (y, x, ratio) of `permute(0, 2, 3, 1)`-ed RPN outputs.

    Args:
        sizes: (height, width) of each level in cells.
        strides: pixels per cell.
        scale: side of the square anchor in cells.
        ratios: height / width.
        rule: `Arithmetic.anchors`.

    Returns:
        One [H_l * W_l * len(ratios), 4] tensor a level, in pixels. An anchor is centred on its cell's top left corner;
        with the centred rules on the cell's middle.
    """
    anchors = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        base = cell_anchors(stride, scale, ratios, device, rule)
        y, x = torch.meshgrid(
            torch.arange(height, device=device) * stride, torch.arange(width, device=device) * stride, indexing="ij"
        )
        shift = torch.stack([x, y, x, y], dim=-1)
        anchors.append((shift[:, :, None] + base).reshape(-1, 4))
    return anchors


def cell_anchors(stride: int, scale: float, ratios: tuple[float, ...], device: torch.device, rule: str) -> Tensor:
    """Anchors [len(ratios), 4] of the cell at (0, 0)."""
    # filled where it is, like `boxes.constant`: a copy from the host cannot be captured in a graph
    ratio = torch.cat([torch.full((1,), value, device=device) for value in ratios])
    root = ratio.sqrt()
    if rule == "centred_ratios":
        cell_width = (stride / root).round()
        width, height = scale * cell_width, scale * (cell_width * ratio).round()
    else:
        width, height = stride * scale / root, stride * scale * root
    base = torch.stack([-width, -height, width, height], dim=-1) / 2
    if rule in ("centred", "centred_ratios"):
        base = base + stride / 2
    return base.round() if rule in ("rounded", "centred") else base
