"""Norm layers by name."""

from __future__ import annotations

import math

import torch
import torch.distributed.nn.functional as dist_functional
from torch import Tensor, nn

from .config_backbones import BackboneConfig
from .distributed import together


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


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes, on any device (PyTorch's own is for GPUs alone)."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and together()):
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        sums, count = (
            x.sum(dim=(0, 2, 3), dtype=torch.float32),
            x.new_tensor([x.numel() // x.shape[1]], dtype=torch.float32),
        )
        sums = dist_functional.all_reduce(torch.cat([sums, count]))
        count = sums[-1].detach()
        centred = x.float() - (mean := sums[:-1] / count)[:, None, None]
        variance = dist_functional.all_reduce(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def make_norm(config: BackboneConfig, channels: int) -> nn.Module:
    """The norm that `config` chooses, for [N, channels, H, W]."""
    if config.norm == "group":  # 32 groups (Wu and He 2018, table 3), or as many as divide Res2Net's odd widths
        return nn.GroupNorm(math.gcd(32, channels), channels, config.norm_eps)
    norm = {
        "frozen_batch": FrozenBatchNorm2d,
        "fixed_batch": FixedBatchNorm2d,
        "batch": nn.BatchNorm2d,
        "sync_batch": SyncBatchNorm2d,
    }[config.norm]
    return norm(channels, config.norm_eps)
