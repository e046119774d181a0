"""Self-calibrated networks ("Improving Convolutional Networks with Self-Calibrated Convolutions", Liu et al. 2020,
section 3.2), called SCNet by their authors; here scnet50, scnet101 and their v1d forms. Not the detector SCNet.

The 3x3 convolution of a bottleneck has two halves: a plain one, and a self-calibrated one (`cascadeops`), each behind a
1x1 convolution of its own. Names are the authors'. Maps of any size pass: where one is smaller than the cells that a
self-calibrated convolution pools over (the authors' code stops there), it is a single cell.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import cascadeops

from .config_backbones import BackboneConfig
from .deformable import make_conv3x3
from .norms import make_norm
from .resnet import make_downsample


class SelfCalibratedBottleneck(nn.Module):
    """Two times 1x1 -> 3x3 (stride), one plain and one self-calibrated, side by side -> 1x1, expansion 4."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, config: BackboneConfig, deformable: bool):
        super().__init__()
        half, out_channels = planes * config.base_width // 64, planes * self.expansion
        pools = config.average_stride and stride > 1
        stride2 = 1 if pools else stride
        self.conv1_a = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn1_a = make_norm(config, half)
        self.conv1_b = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn1_b = make_norm(config, half)
        self.k1 = nn.Sequential(make_conv3x3(half, half, stride2, 1, deformable), make_norm(config, half))
        self.scconv = cascadeops.SelfCalibratedConv2d(half, stride2, norm=partial(make_norm, config))
        self.conv3 = nn.Conv2d(2 * half, out_channels, 1, bias=False)
        self.bn3 = make_norm(config, out_channels)
        self.downsample = make_downsample(in_channels, out_channels, stride, config)
        self.pool = nn.AvgPool2d(3, stride, 1) if pools else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        a = self.relu(self.k1(self.relu(self.bn1_a(self.conv1_a(x)))))
        b = self.relu(self.scconv(self.relu(self.bn1_b(self.conv1_b(x)))))
        x = self.pool(torch.cat([a, b], dim=1))
        return self.relu(self.bn3(self.conv3(x)).add_(residual))
