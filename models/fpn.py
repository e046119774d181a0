"""Feature pyramid network (Lin et al. 2017, section 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """C2..C5 -> P2..P6, `channels` wide, strides 4, 8, 16, 32, 64."""

    strides = (4, 8, 16, 32, 64)

    def __init__(self, in_channels: list[int], channels: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output_convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        for conv in (*self.lateral_convs, *self.output_convs):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        maps = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            add_upsampled(maps[i - 1], maps[i])
        pyramid = [conv(x) for conv, x in zip(self.output_convs, maps, strict=True)]
        return [*pyramid, F.max_pool2d(pyramid[-1], kernel_size=1, stride=2)]


def add_upsampled(fine: Tensor, coarse: Tensor) -> None:
    """Adds coarse [N, C, H, W], each pixel of it four times, to fine [N, C, 2 H, 2 W], in place."""
    height, width = coarse.shape[2:]
    if fine.shape[2:] != (2 * height, 2 * width):
        raise ValueError(
            "images must be padded to multiples of 32 pixels: their pyramid has levels of "
            f"{tuple(fine.shape[2:])} and {tuple(coarse.shape[2:])} cells"
        )
    fine.unflatten(3, (width, 2)).unflatten(2, (height, 2)).add_(coarse[:, :, :, None, :, None])
