"""Norm layers by name, and their disappearance into the convolutions before them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .config_backbones import BackboneConfig
from .deformable import DeformableConv2d


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always uses its running statistics; scale and shift still train."""

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        return super().train(False)


class FixedBatchNorm2d(FrozenBatchNorm2d):
    """Batch norm of which nothing trains: one scale and shift for each channel; eps may be 0."""

    def __init__(self, channels: int, eps: float):
        super().__init__(channels, eps)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


def make_norm(config: BackboneConfig, channels: int) -> nn.Module:
    """The norm that `config` chooses, for [N, channels, H, W]."""
    if config.norm == "group":  # 32 groups (Wu and He 2018, table 3), or as many as divide Res2Net's odd widths
        return nn.GroupNorm(math.gcd(32, channels), channels, config.norm_eps)
    norm = {
        "frozen_batch": FrozenBatchNorm2d,
        "fixed_batch": FixedBatchNorm2d,
        "batch": nn.BatchNorm2d,
        "sync_batch": nn.SyncBatchNorm,
    }[config.norm]
    return norm(channels, config.norm_eps)


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose batch norms are part of the convolutions before them: same results, fewer passes."""
    module = copy.deepcopy(module).eval()
    for parent in list(module.modules()):
        for conv_parent, conv_name, norm_parent, norm_name in list(_neighbours(parent)):
            conv, norm = getattr(conv_parent, conv_name), getattr(norm_parent, norm_name)
            if isinstance(conv, nn.Conv2d | DeformableConv2d) and isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
                setattr(conv_parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(norm_parent, norm_name, nn.Identity())
    return module


def _neighbours(parent: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, str]]:
    """Children that run one after the other, each as (its owner, its name).

    Every block registers a norm right behind its convolution; Res2Net a list of norms behind a list of convolutions;
    and a deep stem, with its norm behind it, ends in the last of its three convolutions.
    """
    for (name, child), (next_name, next_child) in pairwise(parent.named_children()):
        if isinstance(child, nn.ModuleList) and isinstance(next_child, nn.ModuleList):
            yield from ((child, str(i), next_child, str(i)) for i in range(min(len(child), len(next_child))))
        elif isinstance(child, nn.Sequential) and len(child):
            yield child, str(len(child) - 1), parent, next_name
        else:
            yield parent, name, parent, next_name
