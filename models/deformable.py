"""The deformable convolution with the convolution that gives its offsets (Dai et al. 2017, section 2.1)."""

from __future__ import annotations

from torch import Tensor, nn

import cascadeops


class DeformableConv2d(cascadeops.DeformConv2d):
    """A 3x3 convolution whose taps move by offsets that a plain 3x3 convolution of the same input gives.

    Version 1: no modulation mask, one group of offsets. With the offsets' weights at zero, as they start, it is the
    plain convolution, so that weights of one load into it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int = 1):
        super().__init__(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)
        self.offset = nn.Conv2d(in_channels, 2 * 3 * 3, 3, stride, padding=1)
        self.zero_offsets()

    def zero_offsets(self) -> None:
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, self.offset(x))


def make_conv3x3(in_channels: int, out_channels: int, stride: int, groups: int, deformable: bool) -> nn.Module:
    """3x3, padding 1, no bias: a norm follows."""
    if deformable:
        return DeformableConv2d(in_channels, out_channels, stride, groups)
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=False)
