"""ResNet ("Deep Residual Learning for Image Recognition", He et al. 2016), stride in the 3x3 convolution.

Differs from the paper only in that (ResNet v1.5, as torchvision and mmdetection have it). Names are torchvision's.
"""

from __future__ import annotations

import copy
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .config import ResNetConfig


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always uses its running statistics; scale and shift still train."""

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        return super().train(False)


def make_norm(norm: str, channels: int) -> nn.Module:
    if norm == "group":
        return nn.GroupNorm(min(32, channels // 4), channels)
    return (FrozenBatchNorm2d if norm == "frozen_batch" else nn.BatchNorm2d)(channels)


class Bottleneck(nn.Module):
    """1x1 -> 3x3 (stride) -> 1x1, expansion 4."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, norm: str):
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = make_norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = make_norm(norm, width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = make_norm(norm, out_channels)
        self.downsample = make_downsample(in_channels, out_channels, stride, norm)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + residual)


class BasicBlock(nn.Module):
    """3x3 (stride) -> 3x3."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, norm: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = make_norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = make_norm(norm, width)
        self.downsample = make_downsample(in_channels, width, stride, norm)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + residual)


def make_downsample(in_channels: int, out_channels: int, stride: int, norm: str) -> nn.Module | None:
    if in_channels == out_channels and stride == 1:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        make_norm(norm, out_channels),
    )


class ResNet(nn.Module):
    """Returns C2..C5, strides 4, 8, 16, 32; `out_channels` holds their channels."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        block = Bottleneck if config.bottleneck else BasicBlock
        self.conv1 = nn.Conv2d(3, config.width, 7, 2, 3, bias=False)
        self.bn1 = make_norm(config.norm, config.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels, self.out_channels, layers = config.width, [], []
        for i, num_blocks in enumerate(config.layers):
            width = config.width * 2**i
            blocks = []
            for j in range(num_blocks):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, width, stride, config.norm))
                channels = width * block.expansion
            layers.append(nn.Sequential(*blocks))
            self.out_channels.append(channels)
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self._initialise()
        frozen = [self.conv1, self.bn1, self.layer1, self.layer2, self.layer3, self.layer4]
        self.frozen = frozen[: config.frozen_stages + 2] if config.frozen_stages else []
        for module in self.frozen:
            module.requires_grad_(False)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            # A block's last scale starts at zero, so that the block starts as the identity (Goyal et al. 2017, 5.1).
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose batch norms are part of the convolutions before them: same results, fewer passes.

    A norm is folded into a convolution that its module registers right before it, as every block here does.
    """
    module = copy.deepcopy(module).eval()
    for parent in list(module.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return module
