"""Res2Net ("Res2Net: A New Multi-scale Backbone Architecture", Gao et al., TPAMI 2021, figure 2b).

The 3x3 convolution of a bottleneck becomes a chain: the channels are split, each split is added to the result of the
one before it and convolved, so that a block sees several scales. Names are the authors'. The v1d form (the authors'
v1b) has a deep stem and average pooling in the shortcuts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config_backbones import BackboneConfig
from .deformable import make_conv3x3
from .norms import make_norm
from .resnet import make_downsample


class Res2NetBottleneck(nn.Module):
    """1x1 -> 3x3 over splits (stride) -> 1x1, expansion 4.

    In the first block of a layer the splits do not meet, since their maps shrink, and the last one, which has no
    convolution, is pooled instead of passed on.
    """

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, config: BackboneConfig, deformable: bool):
        super().__init__()
        out_channels = planes * self.expansion
        self.width = planes * config.base_width // 64
        self.is_first = in_channels != out_channels
        stride1, stride2 = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, self.width * config.scale, 1, stride1, bias=False)
        self.bn1 = make_norm(config, self.width * config.scale)
        self.convs = nn.ModuleList(
            make_conv3x3(self.width, self.width, stride2, 1, deformable) for _ in range(config.scale - 1)
        )
        self.bns = nn.ModuleList(make_norm(config, self.width) for _ in self.convs)
        self.conv3 = nn.Conv2d(self.width * config.scale, out_channels, 1, bias=False)
        self.bn3 = make_norm(config, out_channels)
        self.downsample = make_downsample(in_channels, out_channels, stride, config)
        pools = self.is_first and (config.stage_pool or stride2 != 1)
        self.pool = nn.AvgPool2d(3, stride2, 1) if pools else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        *splits, last = self.relu(self.bn1(self.conv1(x))).split(self.width, dim=1)
        results = []
        for split, conv, norm in zip(splits, self.convs, self.bns, strict=True):
            if results and not self.is_first:
                split = split + results[-1]
            results.append(self.relu(norm(conv(split))))
        x = torch.cat([*results, self.pool(last)], dim=1)
        return self.relu(self.bn3(self.conv3(x)).add_(residual))
