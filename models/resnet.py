"""ResNet ("Deep Residual Learning for Image Recognition", He et al. 2016), and ResNeXt ("Aggregated Residual
Transformations for Deep Neural Networks", Xie et al. 2017), which is the same with groups.

Differs from the papers in that the stride sits in the 3x3 convolution (ResNet v1.5, as torchvision and mmdetection have
it; `stride_in_1x1` is the papers' way). Names are torchvision's.
"""

from __future__ import annotations

from torch import Tensor, nn

from .config_backbones import BackboneConfig
from .deformable import DeformableConv2d, make_conv3x3
from .norms import make_norm


class Bottleneck(nn.Module):
    """1x1 -> 3x3 (stride) -> 1x1, expansion 4."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, config: BackboneConfig, deformable: bool):
        super().__init__()
        width, out_channels = planes * config.base_width // 64 * config.groups, planes * self.expansion
        stride1, stride2 = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride1, bias=False)
        self.bn1 = make_norm(config, width)
        self.conv2 = make_conv3x3(width, width, stride2, config.groups, deformable)
        self.bn2 = make_norm(config, width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = make_norm(config, out_channels)
        # The last scale starts at zero, so that the block starts as the identity (Goyal et al. 2017, section 5.1).
        nn.init.zeros_(self.bn3.weight)
        self.downsample = make_downsample(in_channels, out_channels, stride, config)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)).add_(residual))


class BasicBlock(nn.Module):
    """3x3 (stride) -> 3x3."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int, config: BackboneConfig, deformable: bool):
        super().__init__()
        assert not deformable, "BackboneConfig refuses it"
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False)
        self.bn1 = make_norm(config, planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = make_norm(config, planes)
        nn.init.zeros_(self.bn2.weight)
        self.downsample = make_downsample(in_channels, planes, stride, config)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)).add_(residual))


def make_downsample(in_channels: int, out_channels: int, stride: int, config: BackboneConfig) -> nn.Module | None:
    """The shortcut of a block that changes shape; with `average_down` the pool has a place even at stride 1 (names)."""
    if in_channels == out_channels and stride == 1:
        return None
    if config.average_down:
        return nn.Sequential(
            nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            make_norm(config, out_channels),
        )
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        make_norm(config, out_channels),
    )


def make_stem(config: BackboneConfig) -> tuple[nn.Module, int]:
    """Stride 2, [N, 3, H, W] to [N, channels, H/2, W/2] before its last norm; and `channels`."""
    if not config.deep_stem:
        return nn.Conv2d(3, config.width, 7, 2, 3, bias=False), config.width
    narrow, channels = config.deep_stem, 2 * config.deep_stem
    stem = nn.Sequential(
        nn.Conv2d(3, narrow, 3, 2, 1, bias=False),
        make_norm(config, narrow),
        nn.ReLU(inplace=True),
        nn.Conv2d(narrow, narrow, 3, 1, 1, bias=False),
        make_norm(config, narrow),
        nn.ReLU(inplace=True),
        nn.Conv2d(narrow, channels, 3, 1, 1, bias=False),
    )
    return stem, channels


class ResNet(nn.Module):
    """A stem and four layers of residual blocks: returns C2..C5, strides 4, 8, 16, 32.

    Args:
        block: class of the blocks; made with (in_channels, planes, stride, config, deformable).

    `out_channels` holds the channels of C2..C5.
    """

    def __init__(self, config: BackboneConfig, block: type[nn.Module]):
        super().__init__()
        self.conv1, channels = make_stem(config)
        self.bn1 = make_norm(config, channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.out_channels, layers = [], []
        for i, num_blocks in enumerate(config.layers):
            planes = config.width * 2**i
            blocks = []
            for j in range(num_blocks):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, planes, stride, config, config.deformable_stages[i]))
                channels = planes * block.expansion
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
            if isinstance(module, nn.Conv2d | DeformableConv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, DeformableConv2d):
                module.zero_offsets()

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
