"""From a configuration to a backbone."""

from __future__ import annotations

from .config_backbones import BackboneConfig
from .res2net import Res2NetBottleneck
from .resnet import BasicBlock, Bottleneck, ResNet
from .sc_resnet import SelfCalibratedBottleneck

BLOCKS = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
    "res2net": Res2NetBottleneck,
    "self_calibrated": SelfCalibratedBottleneck,
}


def build_backbone(config: BackboneConfig) -> ResNet:
    """The backbone with random weights: images [N, 3, H, W] to C2..C5; `out_channels` holds their channels."""
    return ResNet(config, BLOCKS[config.block])
