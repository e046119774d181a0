"""Norm layers by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config_backbones import BackboneConfig


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
